"""Arrays on the devices of several processes: gathering them on the hosts, and writing files from one process.

All processes must make the same calls in the same order; collective operations wait for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from monoblock.backends.flax.explicit import on_automatic
from monoblock.errors import CheckpointError

Read = Callable[[int], Any]  # index of an array -> its values on the host

_WRITER = 0
_DONE, _FAILED = -1, -2


def is_elsewhere(x: Any) -> bool:
    """Whether an array has shards on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def on_host(x: Any) -> Any:
    """An array as a whole NumPy array in every process; a collective operation if it has shards in several
    processes."""
    if is_elsewhere(x) and not x.is_fully_replicated:
        x = multihost_utils.process_allgather(on_automatic(x), tiled=True)
    return np.asarray(x)


def write_once(arrays: Sequence[Any], write: Callable[[Read], None]) -> None:
    """Call `write` with a function that reads the arrays. If they are on devices of several processes, process 0
    writes, gathering array after array, and the others wait until it has finished.

    CheckpointError in the other processes if the write fails; ValueError if there are processes without shards.
    """
    elsewhere = [x for x in arrays if is_elsewhere(x)]
    if not elsewhere:
        write(lambda number: on_host(arrays[number]))
        return
    holders = {device.process_index for x in elsewhere for device in x.sharding.device_set}
    if len(holders) < jax.process_count():
        raise ValueError(
            f"the parameters are on devices of {len(holders)} of {jax.process_count()} processes: save from a mesh "
            "of all processes"
        )
    (_write if jax.process_index() == _WRITER else _wait)(arrays, write)


def _write(arrays: Sequence[Any], write: Callable[[Read], None]) -> None:
    def read(number: int) -> Any:
        if is_elsewhere(arrays[number]):
            _broadcast(number)
        return on_host(arrays[number])

    ended = _FAILED
    try:
        write(read)
        ended = _DONE
    finally:
        _broadcast(ended)


def _wait(arrays: Sequence[Any], write: Callable[[Read], None]) -> None:
    del write
    while (number := _broadcast(_FAILED)) >= 0:
        on_host(arrays[number])  # discarded: gathering is a collective operation
    if number == _FAILED:
        raise CheckpointError(
            f"process {_WRITER} could not save the model (see its error); nothing was changed"
        )


def _broadcast(number: int) -> int:
    """Broadcast the writer's number to every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number), jax.process_index() == _WRITER))
