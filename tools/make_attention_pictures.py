"""Writes the pictures of docs/attention.md, one for each family: `python tools/make_attention_pictures.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from monoblock import AutoConfig
from monoblock.tokenization import PreTrainedTokenizerFast
from monoblock.utils.attention_visualizer import AttentionMaskVisualizer

FOLDER = Path(__file__).parents[1] / "docs" / "attention"
TEXT, SHORT, QUESTION = "Do you have mayonnaise recipes ?", "Hello there", "What is in the picture ?"
SPECIAL = ("<unk>", "<s>", "</s>", "<0x04>", "|SPEAKER|", "|NEWLINE|")

# model_type -> config fields, and arguments of the visualizer.
PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mpt": ({"n_heads": 8, "n_layers": 4, "d_model": 64}, {"text": TEXT}),
    "mistral": ({"sliding_window": 4, "num_hidden_layers": 4}, {"text": TEXT}),
    "fuyu": (
        {"num_hidden_layers": 4, "image_token_id": SPECIAL.index("|SPEAKER|")},
        {"text": QUESTION, "patches": (2, 3)},
    ),
    "openai-gpt": ({"n_layer": 4}, {"text": [TEXT, SHORT], "padding_side": "left"}),
    "gpt_neo": (
        {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 3},
        {"text": TEXT},
    ),
    "mpnet": ({"num_hidden_layers": 4, "relative_attention_num_buckets": 16}, {"text": TEXT}),
}


def tokenizer(bos_and_eos: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, optionally with `<s>` and `</s>` around the text, as for MPNet."""
    words = dict.fromkeys([*SPECIAL, *" ".join((TEXT, SHORT, QUESTION)).split()])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos_and_eos:
        ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def picture(model_type: str) -> str:
    """The SVG of one family."""
    fields, call = PICTURES[model_type]
    config = AutoConfig.for_model(model_type, **fields)
    visualizer = AttentionMaskVisualizer.from_config(config, tokenizer(bos_and_eos=model_type == "mpnet"))
    visualizer.read(**call)
    return visualizer.svg()


def path(model_type: str) -> Path:
    """The file of a family's picture."""
    return FOLDER / f"{model_type}.svg"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        path(name).write_text(picture(name), encoding="utf-8", newline="\n")
