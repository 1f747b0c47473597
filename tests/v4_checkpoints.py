"""Checkpoints and recorded outputs of transformers 4's Flax and TensorFlow classes, and comparison with them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from measure import rounding

FOLDER = Path(__file__).parent / "fixtures" / "v4"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
FLAX = [name for name in NAMES if name.startswith("Flax")]
TENSORFLOW = [name for name in NAMES if name.startswith("TF")]

# The v4 classes of GPT-1 use another GELU (see the fixtures' README); measured 1.5e-3 for logits of about 10.
ATOL_OTHER_GELU = 3e-3


def class_name(name: str) -> str:
    """The class name without the prefix of its framework."""
    return name.removeprefix("Flax").removeprefix("TF")


def exact_atol(name: str, spec: Any) -> float:
    """Bound on the difference from the recorded outputs if only the order of sums differs."""
    return rounding(spec, outputs(name))


def atol(name: str, spec: Any) -> float:
    """Bound on the difference from the recorded outputs."""
    return ATOL_OTHER_GELU if "OpenAIGPT" in name else exact_atol(name, spec)


@functools.cache
def record(name: str) -> dict[str, np.ndarray]:
    """The arrays of io.npz; ids and masks as int64."""
    with np.load(FOLDER / name / "io.npz") as file:
        found = {key: file[key] for key in file.files}
    return {k: v.astype(np.int64) if v.dtype.kind in "iu" else v for k, v in found.items()}


def inputs(name: str) -> dict[str, np.ndarray]:
    """The keyword arguments of the forward pass."""
    return {k.removeprefix("in."): v for k, v in record(name).items() if k.startswith("in.")}


def outputs(name: str) -> dict[tuple[str, int | None], np.ndarray]:
    """(field, layer or None) -> the recorded output."""
    found: dict[tuple[str, int | None], np.ndarray] = {}
    for key, value in record(name).items():
        if key.startswith("out."):
            field, _, layer = key.removeprefix("out.").partition(".")
            found[field, int(layer) if layer else None] = value
    return found


def prompt(name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A prompt, and the prompt followed by 12 greedy tokens; None for classes that do not generate."""
    found = record(name)
    return (found["gen.input_ids"], found["gen.sequences"]) if "gen.input_ids" in found else None


def difference(name: str, field: str, got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of two outputs of a field, where the mask is 1."""
    if got.size != wanted.size:
        raise AssertionError(f"{field} is {got.shape}, recorded {wanted.shape}")
    mask = inputs(name)["attention_mask"].astype(bool)
    rows, tokens = mask.reshape(-1, mask.shape[-1]).shape
    valid = mask.reshape(rows, tokens)
    got, wanted = got.reshape(wanted.shape), wanted
    if field == "attentions":  # (rows, heads, queries, keys): padding queries are undefined
        got, wanted = got.swapaxes(1, 2)[valid], wanted.swapaxes(1, 2)[valid]
    elif got.size % (rows * tokens) == 0 and tokens in got.shape:
        got, wanted = (x.reshape(rows, tokens, -1)[valid] for x in (got, wanted))
    return float(np.abs(got - wanted).max())
