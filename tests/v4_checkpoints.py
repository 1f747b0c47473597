"""The checkpoints of transformers 4's other classes: where they are, what they hold, and how outputs compare."""

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

# GPT-1's old classes computed another GELU (see the fixtures' README); measured 1.5e-3 on logits of about 10.
ATOL_OTHER_GELU = 3e-3


def class_name(name: str) -> str:
    """The class's name without its framework."""
    return name.removeprefix("Flax").removeprefix("TF")


def exact_atol(name: str, spec: Any) -> float:
    """How far the recorded outputs of a model of that ArchSpec may be off if only the order of sums differs."""
    return rounding(spec, outputs(name))


def atol(name: str, spec: Any) -> float:
    """How far they may be off at all."""
    return ATOL_OTHER_GELU if "OpenAIGPT" in name else exact_atol(name, spec)


@functools.cache
def record(name: str) -> dict[str, np.ndarray]:
    """Everything of io.npz; ids and masks as int64."""
    with np.load(FOLDER / name / "io.npz") as file:
        found = {key: file[key] for key in file.files}
    return {k: v.astype(np.int64) if v.dtype.kind in "iu" else v for k, v in found.items()}


def inputs(name: str) -> dict[str, np.ndarray]:
    """The forward's keywords."""
    return {k.removeprefix("in."): v for k, v in record(name).items() if k.startswith("in.")}


def outputs(name: str) -> dict[tuple[str, int | None], np.ndarray]:
    """(field, layer or None) -> what the old class gave."""
    found: dict[tuple[str, int | None], np.ndarray] = {}
    for key, value in record(name).items():
        if key.startswith("out."):
            field, _, layer = key.removeprefix("out.").partition(".")
            found[field, int(layer) if layer else None] = value
    return found


def prompt(name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A prompt, and it with 12 greedy tokens after it; None where the class does not generate."""
    found = record(name)
    return (found["gen.input_ids"], found["gen.sequences"]) if "gen.input_ids" in found else None


def difference(name: str, field: str, got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of two outputs of a field, where the mask is 1."""
    if got.size != wanted.size:
        raise AssertionError(f"{field} is {got.shape}, recorded {wanted.shape}")
    mask = inputs(name)["attention_mask"].astype(bool)
    rows, tokens = mask.reshape(-1, mask.shape[-1]).shape
    seen = mask.reshape(rows, tokens)
    got, wanted = got.reshape(wanted.shape), wanted
    if field == "attentions":  # (rows, heads, queries, keys): what a padding query looks at means nothing
        got, wanted = got.swapaxes(1, 2)[seen], wanted.swapaxes(1, 2)[seen]
    elif got.size % (rows * tokens) == 0 and tokens in got.shape:
        got, wanted = (x.reshape(rows, tokens, -1)[seen] for x in (got, wanted))
    return float(np.abs(got - wanted).max())
