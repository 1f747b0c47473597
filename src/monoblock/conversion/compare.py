"""Verify a converted checkpoint: compare its tensors, and the logits of source and result."""

import importlib
from dataclasses import dataclass

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import DTYPE_NAMES, Array
from monoblock.checkpoint.formats import Checkpoint
from monoblock.conversion.logits import LogitComparison
from monoblock.errors import CheckpointError
from monoblock.installed import installed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of a comparison: `equal` of the `tensors` have the same values (for equal dtypes: the same bits); the
    others differ by at most `difference`, from rounding. `logits` is None if the models were not run, for the reason
    `why`."""

    tensors: int
    equal: int
    difference: float
    logits: LogitComparison | None
    why: str = ""


def compare(source: Checkpoint, expected: Checkpoint, written: Checkpoint) -> Comparison:
    """Compare the `written` tensors with the `expected` ones (before rounding), and the logits with the `source`'s.

    CheckpointError if a tensor differs by more than the rounding error of its dtype, if the specs differ, or if the
    logits differ although all tensors are the same.
    """
    if written.config.to_spec() != expected.config.to_spec():
        raise CheckpointError("the check failed: the written config describes another architecture")
    equal, difference, names = 0, 0.0, expected.weights.shapes()
    for name in names:
        moved = _distance(name, expected.weights.read(name), written.weights.read(name))
        equal += moved == 0
        difference = max(difference, moved)
    logits, why = None, "PyTorch is not installed"
    if installed("torch"):
        run = importlib.import_module("monoblock.backends.pytorch.compare")
        logits, why = run.compare(source, written), ""
        same_model = equal == len(names) and source.weights.shapes() == written.weights.shapes()
        if same_model and not logits.difference <= 0.01 * logits.magnitude:
            raise CheckpointError(
                f"the check failed: the tensors are the same, but logits differ by {logits.difference:.3g}"
            )
    return Comparison(tensors=len(names), equal=equal, difference=difference, logits=logits, why=why)


def _distance(name: str, expected: Array, found: Array) -> float:
    """The largest absolute difference; CheckpointError if it exceeds the rounding error."""
    kind = casts.dtype_of(found)
    if casts.dtype_of(expected) == kind and expected.shape == found.shape:
        if np.array_equal(_bits(expected), _bits(found)):
            return 0.0
        raise CheckpointError(
            f"the check failed: {name} differs between writing and reading back: check the disk"
        )
    if expected.shape != found.shape:
        raise CheckpointError(f"the check failed: {name} is {found.shape}, expected {expected.shape}")
    a, b = casts.widened(expected), casts.widened(found)
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    relative, absolute = casts.ROUNDING[kind]
    allowed = np.maximum(np.abs(a) * relative, absolute)
    same = np.isnan(a) & np.isnan(b) | (a == b)
    if not np.all(same | (gap <= allowed)):
        raise CheckpointError(
            f"the check failed: {name} differs by more than the rounding error of {DTYPE_NAMES[kind]}"
        )
    return float(np.max(gap, where=~same, initial=0.0))


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
