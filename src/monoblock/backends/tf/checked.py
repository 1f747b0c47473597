"""Validation of a call's arguments on TensorFlow. Tensors of a graph have no values to check."""

from __future__ import annotations

from typing import Any

from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.namespace import XP
from monoblock.backends.xla import checked as shared
from monoblock.backends.xla.checked import CheckedInputs
from monoblock.heads import HeadSpec
from monoblock.spec import ArchSpec


def check_inputs(
    spec: ArchSpec,
    head: HeadSpec | None,
    arguments: dict[str, Any],
    cache: Cache | None,
    train: bool,
    *,
    documents: bool = True,
) -> CheckedInputs:
    """Check arguments (tensors; None left out); ValueError if one does not fit. See `xla/checked.py`."""
    return shared.check_inputs(XP, spec, head, arguments, cache, train=train, documents=documents)
