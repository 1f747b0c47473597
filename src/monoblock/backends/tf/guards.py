"""Checks of values when a graph runs, which end it with an error message.

Programs compiled by XLA cannot raise errors; they are not checked.
"""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from monoblock.backends.tf.ops import Tensor, size

PREFIX = "monoblock: "  # of the messages of these checks
_MESSAGE = re.compile(rf"assertion failed: \[{PREFIX}(.*)\]\n")


def assert_in_graph(x: Tensor, condition: Tensor, *message: Any) -> Tensor:
    """The tensor, with an assertion of the `condition`; `message`: strings and tensors."""
    with tf.control_dependencies([tf.debugging.Assert(condition, [PREFIX + message[0], *message[1:]])]):
        return tf.identity(x)


def check_range(name: str, x: Tensor, count: int, advice: str) -> Tensor:
    """Integers with an assertion in graphs that they are 0 to `count - 1`; unchanged in eager mode."""
    if tf.executing_eagerly():
        return x
    low, high = tf.reduce_min(x), tf.reduce_max(x)
    valid = (tf.size(x) == 0) | ((low >= 0) & (high < count))
    return assert_in_graph(
        x, valid, f"{name} must be 0 to {count - 1} ({advice}), but go from", low, "to", high
    )


def check_length(tokens: Tensor, room: int) -> Tensor:
    """Tokens (b, s, ..), at most `room` of them, padding included: ValueError if the length is static, else an
    assertion in the graph."""
    message = (
        f"the model has {room} learned positions, but the input has",
        "tokens (padding counts in a graph): shorten it",
    )
    count = size(tokens, 1)
    if not isinstance(count, int):
        return assert_in_graph(tokens, count <= room, message[0], count, message[1])
    if count > room:
        raise ValueError(f"{message[0]} {count} {message[1]}")
    return tokens


def check_labels(labels_n: Tensor, real_n: Tensor, count: int) -> Tensor:
    """Labels with 0 for ignored ones (not `real`), with an assertion in graphs that they are classes below `count`."""
    return check_range("labels", tf.where(real_n, labels_n, 0), count, "-100 stands for none")


def error_message(error: Any) -> str | None:
    """The message of a failed check of this module, or None."""
    found = _MESSAGE.search(str(getattr(error, "message", "")))
    return None if found is None else found[1].replace("] [", " ")
