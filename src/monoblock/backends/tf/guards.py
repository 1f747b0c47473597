"""Values that a graph checks when it runs: where they are wrong, it ends with a sentence that says so.

What XLA compiles cannot raise; there nothing is checked.
"""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from monoblock.backends.tf.ops import Tensor, size

OURS = "monoblock: "  # which begins what is said here
_SAID = re.compile(rf"assertion failed: \[{OURS}(.*)\]\n")


def checked_later(x: Tensor, fine: Tensor, *said: Any) -> Tensor:
    """The tensor; a graph ends with what is `said`, texts and tensors, where it is not `fine`."""
    with tf.control_dependencies([tf.debugging.Assert(fine, [OURS + said[0], *said[1:]])]):
        return tf.identity(x)


def within(name: str, x: Tensor, count: int, advice: str) -> Tensor:
    """Whole numbers that a graph checks to be 0 to `count - 1`; as they are, where they have values."""
    if tf.executing_eagerly():
        return x
    low, high = tf.reduce_min(x), tf.reduce_max(x)
    fine = (tf.size(x) == 0) | ((low >= 0) & (high < count))
    return checked_later(x, fine, f"{name} must be 0 to {count - 1} ({advice}), but go from", low, "to", high)


def short(tokens: Tensor, room: int) -> Tensor:
    """Tokens (b, s, ..), at most `room` of them, padding included: ValueError where that is known while tracing, else
    the graph checks it."""
    said = (
        f"the model has {room} learned positions, but the text has",
        "tokens (padding counts in a graph): cut it",
    )
    count = size(tokens, 1)
    if not isinstance(count, int):
        return checked_later(tokens, count <= room, said[0], count, said[1])
    if count > room:
        raise ValueError(f"{said[0]} {count} {said[1]}")
    return tokens


def classes(labels_n: Tensor, real_n: Tensor, count: int) -> Tensor:
    """Labels of `count` classes, 0 where they are not `real`; a graph ends if there is another."""
    return within("labels", tf.where(real_n, labels_n, 0), count, "-100 stands for none")


def sentence(error: Any) -> str | None:
    """What a graph says that ended here, or None."""
    found = _SAID.search(str(getattr(error, "message", "")))
    return None if found is None else found[1].replace("] [", " ")
