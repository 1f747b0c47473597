"""The models of the benchmark: published shapes with random weights, written once into a folder.

    python bench/shapes.py FOLDER [NAME ...]

Each model has a synthetic vocabulary in tokenizer.json and tokenizer.model, which the peers' converters require.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model: class names, config fields that differ from the defaults, and the stored dtype."""

    config: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: str = "bfloat16"


_MISTRAL = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "sliding_window": None,
}
_NEO = {
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "attention_types": [[["global", "local"], 6]],
}
SHAPES = {
    "mistral-1b": Shape("MistralConfig", "MistralForCausalLM", _MISTRAL),
    "mpt-1b": Shape("MptConfig", "MptForCausalLM"),
    "gpt-neo-125m": Shape("GPTNeoConfig", "GPTNeoForCausalLM", _NEO, "float32"),
    "openai-gpt": Shape("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {}, "float32"),
    # For long sequences.
    "mpt-small": Shape(
        "MptConfig",
        "MptForCausalLM",
        {"d_model": 512, "n_heads": 8, "n_layers": 4, "vocab_size": 1000, "max_seq_len": 65536},
        "float32",
    ),
    # Dominated by overhead; the difference of two depths gives the overhead per layer.
    "thin-4": Shape("MistralConfig", "MistralForCausalLM", {}, "float32"),
    "thin-28": Shape("MistralConfig", "MistralForCausalLM", {}, "float32"),
}
_THIN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "sliding_window": None,
}
for _layers in (4, 28):
    SHAPES[f"thin-{_layers}"].fields.update(_THIN | {"num_hidden_layers": _layers})

# Sizes for `--quick`.
SMALLER = {
    "mistral-1b": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "mpt-1b": {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 1024},
    "gpt-neo-125m": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
    | {"attention_types": [[["global", "local"], 1]]},
    "openai-gpt": {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 1024},
    "mpt-small": {"d_model": 64, "n_heads": 2, "n_layers": 2},
}


def make(name: str, folder: Path, *, quick: bool = False) -> Path:
    """The model's folder, written if it does not exist; quick: a small model of the same family."""
    target = folder / (f"{name}-quick" if quick else name)
    if (target / "config.json").is_file():
        return target
    from monoblock.checkpoint.save import save_tensors

    shape = SHAPES[name]
    config = _config(shape, SMALLER.get(name, {}) if quick else {})
    target.mkdir(parents=True, exist_ok=True)
    _save_vocabulary(target, config.vocab_size)
    save_tensors(target, dict(_drawn(shape, config)), framework="pt")
    config.save_pretrained(target)  # last: a folder with a config is complete
    return target


def _config(shape: Shape, smaller: dict[str, Any]) -> Any:
    import monoblock

    # Generation ignores eos, so that every run generates the same number of tokens.
    ids = {"bos_token_id": 1, "eos_token_id": 2, "dtype": shape.dtype, "architectures": [shape.model]}
    return getattr(monoblock, shape.config)(**shape.fields | smaller | ids)


def _drawn(shape: Shape, config: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and functions that generate the tensors, so that one tensor at a time is in memory."""
    import torch

    import monoblock

    with torch.device("meta"):
        meta_model = getattr(monoblock, shape.model)(config)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, size: torch.Size) -> torch.Tensor:
        if len(size) == 1 and name.endswith("weight"):
            return torch.ones(size, dtype=getattr(torch, shape.dtype))
        return (torch.randn(size, generator=generator) * 0.02).to(getattr(torch, shape.dtype))

    for name, tensor in meta_model.hub_state_dict().items():
        yield name, lambda name=name, size=tensor.shape: draw(name, size)


def _save_vocabulary(folder: Path, size: int) -> None:
    """Byte tokens and synthetic words, in the two formats that converters read."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [f"\u2581w{number}" for number in range(size - len(pieces))]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}\n'
    )
    kinds = dict.fromkeys(special, 3) | {"<unk>": 2} | dict.fromkeys(pieces[3:259], 6)
    (folder / "tokenizer.model").write_bytes(
        b"".join(_message(1, _piece(p, -float(i), kinds.get(p, 1))) for i, p in enumerate(pieces))
        + _message(2, b"\x18\x02\x98\x02\x01")  # trainer_spec: BPE, byte fallback
    )


def _piece(text: str, score: float, kind: int) -> bytes:
    """SentencePiece's message of a piece: text, score, and type (1 normal, 2 unknown, 3 control, 6 byte)."""
    return _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])


def _message(number: int, content: bytes) -> bytes:
    """A length-delimited protocol buffer field."""
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names or SHAPES:
        print(make(name, Path(folder)))
