"""Argument binding of TF models: positional, keyword, list and dict inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from monoblock.backends.tf.cache import Cache

# Arguments that are options, not tensors.
CALL_OPTIONS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep")

# Arguments of integers.
INTEGER_INPUTS = ("input_ids", "token_type_ids", "position_ids", "mc_token_ids")


def bind(
    model: str,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Bind arguments to names and convert them to tensors, leaving out None: from one tensor, a list or tuple in the
    documented order, a dict, or keywords. TypeError for unknown or duplicate arguments.

    `names`: the positional arguments in the documented order, and the keyword-only ones.
    """
    ordered, extra = names
    given: dict[str, Any] = {}
    if args and isinstance(args[0], Mapping):
        given, args = dict(args[0]), args[1:]
        if args:
            raise TypeError(f"{model} takes a dict and keywords, got {len(args)} more positional arguments")
    elif args and isinstance(args[0], list | tuple) and any(hasattr(x, "shape") for x in args[0]):
        args = (*args[0], *args[1:])
    if len(args) > len(ordered):
        raise TypeError(f"{model} takes at most {len(ordered)} positional inputs, got {len(args)}")
    for more in (dict(zip(ordered, args, strict=False)), kwargs):
        if twice := given.keys() & more.keys():
            raise TypeError(f"{model} got {min(twice)!r} twice")
        given |= more
    known = (*ordered, "training", *extra)
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"{model} has no argument {unknown[0]!r}; it takes: {', '.join(known)}")
    return {
        name: value if name in (*CALL_OPTIONS, "training") else to_tensors(name, value)
        for name, value in given.items()
        if value is not None
    }


def integers(name: str, x: Any) -> Any:
    """Ids and positions of a float dtype as int32: Keras traces with float32 if it does not know the dtype. Float
    values that can be read and are no integers are unchanged."""
    if name not in INTEGER_INPUTS or not tf.is_tensor(x) or x.dtype not in (tf.float32, tf.float64):
        return x
    if hasattr(x, "numpy") and not bool(tf.reduce_all(x == tf.floor(x))):
        return x  # the check of the inputs raises the error
    return tf.cast(x, tf.int32)


def to_tensors(name: str, value: Any) -> Any:
    """Convert to a tensor or a tuple of tensors; caches are unchanged. ValueError if it cannot be converted."""
    if isinstance(value, Cache | keras.KerasTensor | keras.Variable) or tf.is_tensor(value):
        return value
    if isinstance(value, list | tuple) and any(hasattr(x, "shape") or isinstance(x, tuple) for x in value):
        return tuple(to_tensors(name, x) for x in value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a tensor, or nested lists of equal lengths") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be a tensor or array of numbers, got {type(value).__name__}")
    return tf.convert_to_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


@contextlib.contextmanager
def without_keras_details() -> Iterator[None]:
    """Raise errors unchanged: mark them, so that Keras does not append a listing of all arguments."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error._keras_call_info_injected = True  # pyright: ignore[reportAttributeAccessIssue]
        raise
