"""The chat adapter of the embedded demo (docs/training.md): LoRA matrices, which `merged()` adds to the demo's weights.

No framework and no peft is needed: the merged model is a folder like any other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from monoblock import demo

WEIGHTS = "model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def path() -> Path:
    """The folder of the adapter, in peft's format."""
    return Path(__file__).parent


def merged(folder: Path) -> Path:
    """Write the demo with the adapter into `folder`, for any `from_pretrained`; returns `folder`.

    A weight becomes W + alpha / r * B A, rounded to bfloat16 again (Hu et al., arXiv 2106.09685).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in demo.path().glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((path() / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    header, start, content = _read(demo.path() / WEIGHTS)
    lora, begin, values = _read(path() / "adapter_model.safetensors")
    for name in lora:
        if name.endswith(_A):
            stem = name.removesuffix(_A)
            down, up = (_float32(lora[stem + part], begin, values) for part in (_A, _B))
            entry = header[f"{stem.removeprefix(_PREFIX)}.weight"]
            low, high = (start + offset for offset in entry["data_offsets"])
            weight = _float32(entry, start, content) + scale * (up @ down)
            content[low:high] = _bfloat16(weight).tobytes()
    (folder / WEIGHTS).write_bytes(content)
    return folder


def _read(file: Path) -> tuple[dict[str, Any], int, bytearray]:
    """The header of a safetensors file of this package, where its data begins, and all bytes."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return header, start, content


def _float32(entry: dict[str, Any], start: int, content: bytearray) -> np.ndarray:
    """A bfloat16 tensor: the upper halves of float32 values."""
    low, high = (start + offset for offset in entry["data_offsets"])
    halves = np.frombuffer(bytes(content[low:high]), "<u2").astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(entry["shape"])


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each value, ties to even, as 16-bit integers."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
