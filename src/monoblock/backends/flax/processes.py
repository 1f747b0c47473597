"""Arrays that lie on the devices of several processes: on the host of each of them, and in a file of one of them.

All processes make the same calls in the same order; what is said here of all of them waits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from monoblock.backends.flax.explicit import on_automatic
from monoblock.errors import CheckpointError

Read = Callable[[int], Any]  # number of an array -> its values on the host

_WRITER = 0
_DONE, _FAILED = -1, -2


def is_elsewhere(x: Any) -> bool:
    """Whether part of an array lies on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def on_host(x: Any) -> Any:
    """An array's values in NumPy, whole in every process; all processes ask for it where it lies on devices of
    several."""
    if is_elsewhere(x) and not x.is_fully_replicated:
        x = multihost_utils.process_allgather(on_automatic(x), tiled=True)
    return np.asarray(x)


def write_once(arrays: Sequence[Any], write: Callable[[Read], None]) -> None:
    """`write`, which gets what reads the arrays. Where they lie on devices of several processes, one of these writes,
    reading array after array, and the others wait until all is written.

    CheckpointError in the others if the one that writes fails; ValueError if there are processes without any part.
    """
    elsewhere = [x for x in arrays if is_elsewhere(x)]
    if not elsewhere:
        write(lambda number: on_host(arrays[number]))
        return
    holders = {device.process_index for x in elsewhere for device in x.sharding.device_set}
    if len(holders) < jax.process_count():
        raise ValueError(
            f"the parameters lie on devices of {len(holders)} of {jax.process_count()} processes: save from a mesh "
            "of all of them"
        )
    (_writes if jax.process_index() == _WRITER else _waits)(arrays, write)


def _writes(arrays: Sequence[Any], write: Callable[[Read], None]) -> None:
    def read(number: int) -> Any:
        if is_elsewhere(arrays[number]):
            _told(number)
        return on_host(arrays[number])

    ended = _FAILED
    try:
        write(read)
        ended = _DONE
    finally:
        _told(ended)


def _waits(arrays: Sequence[Any], write: Callable[[Read], None]) -> None:
    del write
    while (number := _told(_FAILED)) >= 0:
        on_host(arrays[number])  # dropped: the writer cannot gather it alone
    if number == _FAILED:
        raise CheckpointError(
            f"process {_WRITER} could not save the model, and says why; nothing was changed"
        )


def _told(number: int) -> int:
    """The number that the writer says, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number), jax.process_index() == _WRITER))
