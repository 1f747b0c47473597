"""The examples of Mistral's, OpenAI GPT's, GPT Neo's and Fuyu's pages, as they stand there, with only the import line
and the checkpoint's name changed: they run here, and give what they give in transformers.

Of the pages' other examples, those of TensorFlow and JAX, the pipeline, 4-bit weights and the mask visualizer are
tested where those parts are.
"""

from __future__ import annotations

import doctest
import functools
import io
import json
import re
import string
import sys
import types
from pathlib import Path
from typing import Any

import fuyu_tokenizer
import pytest
import torch
from helpers import randomised
from measure import assert_close
from pages_families import EXAMPLES, FUYU
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import monoblock
from monoblock.families import family_of

ATOL = 2e-5  # fp32 through the fused kernels


# What the tokenizers learn from: the examples' own texts, so that prompts are short enough; but not the question's,
# in which the answer is to lie where the example says.
TEXTS = [t for code in EXAMPLES.values() for t in re.findall(r'"([^"]+)"', code) if "Jim" not in t]


def gpt2(folder: Path) -> None:
    """Byte-level BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    monoblock.GPT2Tokenizer(tokenizer_object=backend).save_pretrained(folder)


def openai_gpt(folder: Path) -> None:
    """Letters, each also as the last of its word, and two pairs of them."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = ["<unk>", "\n</w>", *letters, *(letter + "</w>" for letter in letters), "do", "ca"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\nc a\n")
    monoblock.OpenAIGPTTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(
        folder
    )


def llama(folder: Path) -> None:
    """SentencePiece's BPE with byte fallback."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for text in TEXTS for word in text.split()]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    vocab = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in vocab["merges"]]
    monoblock.LlamaTokenizerFast(vocab=vocab["vocab"], merges=merges).save_pretrained(folder)


# model_type -> what makes its tokenizer, the fields of a tiny config.
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "mistral": (
        llama,
        {
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 600,
            "sliding_window": 11,
        },
    ),
    "openai-gpt": (
        openai_gpt,
        {"n_embd": 36, "n_layer": 2, "n_head": 6, "n_positions": 128, "vocab_size": 140},
    ),
    "gpt_neo": (
        gpt2,
        {
            "hidden_size": 36,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 6,
            "vocab_size": 600,
            "window_size": 7,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "max_position_embeddings": 320,
        },
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tiny model and its tokenizer for each class."""

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        family = family_of(name)
        assert family is not None
        tokenizer, fields = TINY[family.name]
        # Dropouts of the summary and the attention act in no example: loaded models are at rest.
        randomised(getattr(monoblock, name)(family.config(**fields))).save_pretrained(folder)
        tokenizer(folder)
        return folder

    return made


def run(code: str, library: str, checkpoint: Path | None = None, **more: Any) -> dict[str, Any]:
    """The names that an example has defined in the end."""
    names: dict[str, Any] = dict(more)
    for example in doctest.DocTestParser().get_examples(code):
        line = example.source.replace("from transformers import", f"from {library} import")
        line = re.sub(r"""from_pretrained\(\s*["'][^"']*["']""", f"from_pretrained({str(checkpoint)!r}", line)
        exec(line, names)
    return names


RUN = [t for t in EXAMPLES if not t.endswith("Config") and "FlashAttention" not in t]


@pytest.mark.parametrize("title", RUN)
def test_example(title: str, checkpoints: Any) -> None:
    folder = checkpoints(title.partition(",")[0])
    ours, theirs = run(EXAMPLES[title], "monoblock", folder), run(EXAMPLES[title], "transformers", folder)
    assert type(ours["model"]).__module__.startswith("monoblock")
    assert ours.keys() == theirs.keys()
    compared = 0
    # transformers draws the rows of new tokens, from very near the mean that they are here.
    bound = 1e-3 if "DoubleHeads" in title else ATOL
    for name in ours.keys() - {"gen_tokens", "gen_text"}:  # those are sampled
        a, b = ours[name], theirs[name]
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert torch.isfinite(a).all()
            assert_close(f"{title}: {name}", a, b, bound)
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        elif isinstance(a, int | float | str | list):
            assert a == b, name
        else:
            continue
        compared += 1
    assert compared > 0 or "generation" in title
    if "generation" in title:
        assert ours["gen_tokens"].shape[1] <= 320
        assert ours["gen_text"].startswith(ours["prompt"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlashAttention is there, perhaps")
def test_flash_attention_needs_a_gpu(checkpoints: Any) -> None:
    """The example stops at its first line that needs one, and the error says so."""
    with pytest.raises(ImportError, match="attn_implementation='flash_attention_2' needs a CUDA GPU"):
        run(EXAMPLES["GPTNeoForCausalLM, FlashAttention"], "monoblock", checkpoints("GPTNeoForCausalLM"))


WEIGHTS = {"MistralConfig": 7_110_660_096, "OpenAIGPTConfig": 116_534_784, "GPTNeoConfig": 1_315_575_808}


@pytest.mark.parametrize("title", WEIGHTS)
def test_example_of_a_config(title: str) -> None:
    with torch.device("meta"):  # the default configs are of models of up to 7 billion weights
        names = run(EXAMPLES[title], "monoblock")
    assert names["configuration"] is names["model"].config
    assert names["model"].num_parameters() == WEIGHTS[title]


# ---------------------------------------------------------------------------- Fuyu


def photograph() -> bytes:
    from PIL import Image

    noise = torch.randint(0, 256, (70, 100, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise.numpy()).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def fuyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuyu")
    tokenizer = monoblock.LlamaTokenizerFast(
        tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL
    )
    processor = monoblock.FuyuProcessor(image_processor=monoblock.FuyuImageProcessor(), tokenizer=tokenizer)
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6}
    speaker = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    config = monoblock.FuyuConfig(**sizes, vocab_size=len(tokenizer), image_token_id=speaker)
    randomised(monoblock.FuyuForCausalLM(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`requests`, whose every page is one photograph."""
    fake = types.ModuleType("requests")
    response = types.SimpleNamespace(content=photograph(), raw=io.BytesIO(photograph()))
    fake.__dict__["get"] = lambda *_, **__: response
    monkeypatch.setitem(sys.modules, "requests", fake)
    return fake


def test_fuyu_example(fuyu: Path, web: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    names = run(FUYU["FuyuForCausalLM"], "monoblock", fuyu)
    prompt, out = names["inputs"]["input_ids"], names["generated_ids"]
    assert torch.equal(out[:, : prompt.shape[1]], prompt)
    assert 1 <= out.shape[1] - prompt.shape[1] <= 7
    assert names["outputs"].logits.shape == (*prompt.shape, names["model"].config.vocab_size)
    assert len(names["generation_text"]) == 1
    assert repr(names["generation_text"]) in capsys.readouterr().out
    greedy = prompt
    for _ in range(out.shape[1] - prompt.shape[1]):
        inputs = {**names["inputs"].data, "input_ids": greedy, "attention_mask": torch.ones_like(greedy)}
        places = inputs["image_patches_indices"]
        extra = torch.full((1, greedy.shape[1] - places.shape[1]), -1)
        inputs["image_patches_indices"] = torch.cat((places, extra), 1)
        greedy = torch.cat((greedy, names["model"](**inputs).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(greedy, out)


def test_fuyu_processor_example(fuyu: Path, web: Any) -> None:
    pytest.importorskip("PIL")
    modules = (
        "from transformers.models.fuyu.processing_fuyu import",
        "from transformers.models.fuyu.image_processing_fuyu import",
    )
    code = FUYU["FuyuProcessor"]
    for module in modules:
        code = code.replace(module, "from monoblock import")
    names = run(code, "monoblock", fuyu, io=io, requests=web)
    inputs = names["inputs_to_model"]
    assert {"input_ids", "attention_mask", "image_patches", "image_patches_indices"} <= set(inputs.keys())
    assert inputs["image_patches"][0].shape[-2:] == (3 * 4, 2700)


def test_fuyu_conversion_example(fuyu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` of an instance. The default config is of nine billion weights: only its shape is made."""
    code = FUYU["FuyuForCausalLM, conversion"]
    first, last = code.strip().rsplit("\n", 1)
    made = run(first, "monoblock")
    with torch.device("meta"):
        model = made["FuyuForCausalLM"](made["model_config"])
    assert model.num_parameters() == 9_408_238_592
    tiny = run(last.replace("FuyuForCausalLM(model_config)", "model"), "monoblock", fuyu, model=model)[
        "model"
    ]
    assert tiny.config.hidden_size == 48
    assert tiny.device.type == "cpu"


def test_no_example_is_left_out(pytestconfig: pytest.Config) -> None:
    """The pages themselves, where they lie beside the repository."""
    pages = pytestconfig.rootpath.parent / "shared/seeds"
    later = r"TF[A-Z]|Flax|pipeline|BitsAndBytes|AttentionMaskVisualizer"
    missing = []
    for page in sorted([*pages.glob("002_*.txt"), *pages.glob("004_*.txt")]):
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith(">>> from transformers") and not re.search(later, line):
                missing += [] if any(line in code for code in EXAMPLES.values()) else [line]
    assert not missing
