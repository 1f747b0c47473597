"""The ways in which a TF model takes its arguments: by keyword, in a row, in a list, in a dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from monoblock.backends.tf.cache import Cache

# Arguments that are no tensors: they say what to do.
CALL_OPTIONS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep")

# Arguments of whole numbers.
WHOLE = ("input_ids", "token_type_ids", "position_ids", "mc_token_ids")


def bound(
    model: str,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments by name, as tensors, without those that are None: from one tensor, a list or tuple in the documented
    order, a dict, or keywords; TypeError for what the model does not take.

    `names`: the arguments in the documented order, and those that come by keyword alone.
    """
    ordered, extra = names
    given: dict[str, Any] = {}
    if args and isinstance(args[0], Mapping):
        given, args = dict(args[0]), args[1:]
        if args:
            raise TypeError(f"{model} takes a dict, and keywords beside it, got {len(args)} arguments more")
    elif args and isinstance(args[0], list | tuple) and any(hasattr(x, "shape") for x in args[0]):
        args = (*args[0], *args[1:])
    if len(args) > len(ordered):
        raise TypeError(f"{model} takes at most {len(ordered)} inputs in a row, got {len(args)}")
    for more in (dict(zip(ordered, args, strict=False)), kwargs):
        if twice := given.keys() & more.keys():
            raise TypeError(f"{model} got {min(twice)!r} twice")
        given |= more
    known = (*ordered, "training", *extra)
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"{model} has no argument {unknown[0]!r}; it takes: {', '.join(known)}")
    return {
        name: value if name in (*CALL_OPTIONS, "training") else tensors(name, value)
        for name, value in given.items()
        if value is not None
    }


def whole(name: str, x: Any) -> Any:
    """Ids and positions of a float type that holds them exactly, as int32: Keras traces with float32 where it does not
    know better, and makes its inputs so. Values that can be seen must be whole."""
    if name not in WHOLE or not tf.is_tensor(x) or x.dtype not in (tf.float32, tf.float64):
        return x
    if hasattr(x, "numpy") and not bool(tf.reduce_all(x == tf.floor(x))):
        return x  # which is told where the shapes are checked
    return tf.cast(x, tf.int32)


def tensors(name: str, value: Any) -> Any:
    """A tensor, a tuple of them or a cache; ValueError for what cannot be one."""
    if isinstance(value, Cache | keras.KerasTensor | keras.Variable) or tf.is_tensor(value):
        return value
    if isinstance(value, list | tuple) and any(hasattr(x, "shape") or isinstance(x, tuple) for x in value):
        return tuple(tensors(name, x) for x in value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a tensor, or nested lists of equal lengths") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be a tensor or array of numbers, got {type(value).__name__}")
    return tf.convert_to_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Errors as they are, without the listing of all arguments that Keras adds to what it has not marked so."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error._keras_call_info_injected = True  # pyright: ignore[reportAttributeAccessIssue]
        raise
