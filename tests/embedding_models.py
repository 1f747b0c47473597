"""Small models with weights from NumPy, and the cases whose vectors sentence-transformers gave
(`tools/record_embeddings.py` writes them to `tests/fixtures/embeddings/recorded.npz`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from text_tokenizers import byte_level

import monoblock

RECORDED = Path(__file__).parent / "fixtures" / "embeddings" / "recorded.npz"

SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
VOCAB = 280
WIDTH = 32
LENGTH = 48  # tokens per text, at most
OUT = 12  # outputs of Dense

TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "Grüße aus Köln, 你好 😀",
    "the dog sat on a cat and ran to the mat again; the cat ran on and on over the whole length of the mat, again and "
    "again",  # longer than LENGTH
    "x",
    "the mat ran on",
    "print(f'{x!r}')\n",
]
PAIRS = [("the cat", "a cat sat"), ("a dog ran to the mat", "the mat"), ("x", "y"), (TEXTS[3], "the dog")]
PROMPTS = {"query": "search: ", "passage": "text; "}

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
FIELDS: dict[str, dict[str, Any]] = {
    "MPNet": {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH + 2,
    },
    "Mistral": {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "sliding_window": 16,
    },
    "GPTNeo": {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "max_position_embeddings": LENGTH,
    },
}
# The special tokens around a text, and around the second text of a pair.
TEMPLATES = {
    "MPNet": (["<s>", "A", "</s>"], ["</s>", "B", "</s>"]),
    "Mistral": (["<s>", "A"], ["B"]),
    "GPTNeo": None,
}
FAMILIES = tuple(FIELDS)


def weights(model: Any, seed: int = 0) -> Any:
    """The PyTorch model with normally distributed weights; those of norms around 1."""
    import torch

    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = random.standard_normal(tuple(parameter.shape))
            scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.from_numpy(1 + 0.3 * noise if scale else 0.2 * noise))
    return model.eval()


def write(folder: Path, family: str, head: str = "Model", **fields: Any) -> Path:
    """A checkpoint of a family with its tokenizer."""
    config = getattr(monoblock, f"{family}Config")(**_COMMON, **FIELDS[family], **fields)
    weights(getattr(monoblock, family + head)(config)).save_pretrained(folder)
    write_tokenizer(folder, family)
    return folder


def write_tokenizer(folder: Path, family: str) -> None:
    """A byte-level tokenizer with some words and the family's special tokens."""
    state = json.loads(byte_level(" the", " cat", " dog", " mat", " on", " sat", "the").to_str())
    vocab = state["model"]["vocab"]
    words = sorted((word for word in vocab if word != "<eos>"), key=vocab.__getitem__)
    state["model"]["vocab"] = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    assert len(state["model"]["vocab"]) <= VOCAB
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": i, "content": word, **flags} for i, word in enumerate(SPECIAL.values())]
    if (template := TEMPLATES[family]) is not None:

        def item(token: str) -> dict[str, Any]:
            kind = "Sequence" if len(token) == 1 else "SpecialToken"
            return {kind: {"id": token, "type_id": 0}}

        single, pair = template
        ids = {word: i for i, word in enumerate(SPECIAL.values())}
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [item(token) for token in single],
            "pair": [item(token) for token in [*single, *pair]],
            "special_tokens": {
                word: {"id": word, "ids": [i], "tokens": [word]}
                for word, i in ids.items()
                if word in [*single, *pair]
            },
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "model_max_length": LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def dense_weights() -> tuple[np.ndarray, np.ndarray]:
    """Weight [OUT, WIDTH] and bias [OUT] of the Dense modules."""
    random = np.random.default_rng(7)
    return (
        (random.standard_normal((OUT, WIDTH)) / 4).astype(np.float32),
        random.standard_normal(OUT).astype(np.float32),
    )


def norm_weights() -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias [WIDTH] of the LayerNorm modules."""
    random = np.random.default_rng(8)
    return (
        (1 + 0.3 * random.standard_normal(WIDTH)).astype(np.float32),
        random.standard_normal(WIDTH).astype(np.float32),
    )


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "Sigmoid", "GELU", "SiLU")


class Case(dict[str, Any]):
    """`family`, `pooling` (arguments of Pooling), `after` (the modules after it), `encode` (arguments)."""


def _case(
    family: str = "MPNet", mode: Any = "mean", after: Any = (), prompt_in: bool = True, **encode: Any
) -> Case:
    return Case(family=family, mode=mode, after=after, include_prompt=prompt_in, encode=encode)


CASES: dict[str, Case] = {
    **{f"{family}-{mode}": _case(family, mode) for family in FAMILIES for mode in MODES},
    "two-modes": _case(mode=("cls", "mean")),
    "any-order": _case(mode=("lasttoken", "cls", "max")),
    **{f"dense-{name}": _case(after=(("Dense", name),)) for name in ACTIVATIONS},
    "layer-norm": _case(after=(("LayerNorm",),)),
    "normalize": _case(after=(("Normalize",),)),
    "dense-normalize": _case(after=(("Dense", "Tanh"), ("Normalize",))),
    "prompt": _case(prompt="search: "),
    "prompt-name": _case(prompt_name="query"),
    "prompt-Mistral": _case("Mistral", prompt="search: "),
    **{f"without-prompt-{mode}": _case(mode=mode, prompt_in=False, prompt="search: ") for mode in MODES},
    "without-prompt-Mistral": _case("Mistral", "mean", prompt_in=False, prompt="search: "),
    "truncate": _case(truncate_dim=10),
    "truncate-normalize": _case(truncate_dim=10, normalize_embeddings=True),
}
# Scores of pairs: family, labels, arguments of predict.
SCORES: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"{family}-{labels}": (family, labels, {}) for family in FAMILIES for labels in (1, 3)},
    "softmax": ("MPNet", 3, {"apply_softmax": True}),
    "prompt": ("MPNet", 1, {"prompt": "search: "}),
}


def vectors(count: int, seed: int, width: int = 16) -> np.ndarray:
    """Embeddings with clusters, for functions on embeddings."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((5, width))
    return (centres[random.integers(0, 5, count)] + 0.4 * random.standard_normal((count, width))).astype(
        np.float32
    )
