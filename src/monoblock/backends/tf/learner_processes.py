"""The workers that fine-tune one model on TensorFlow, each with all weights, and their collectives.

They are those of `tf.distribute.MultiWorkerMirroredStrategy`. Keras 3's `fit` does not run under that strategy: it
makes tensors of the first batch of a distributed data set, whose values are `PerReplica`. Here each worker computes the
gradients of its rows on variables of its own, and the strategy sums the gradients.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pickle
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.ops import Tensor
from monoblock.training.options import TrainingOptions
from monoblock.training.processes import Launch, Processes

_FAILED = "monoblock/failed"  # a key of the first worker that failed
_LOST = (
    "collective",
    "connection",
    "coordination",
    "socket",
    "unavailable",
    "aborted",
)  # in errors of TensorFlow


class StrategyWorkers(Processes):
    """The workers of a strategy; each has a part of the rows."""

    def __init__(self, strategy: Any, started: Launch) -> None:
        self.strategy = strategy
        self.rank, self.size = started.rank, started.size
        self.row, self.rows = self.rank, self.size
        self._summed = tf.function(self._run, autograph=False)

    def _run(self, tensors: list[Tensor]) -> Any:
        def replica(given: list[Tensor]) -> Any:
            # Copies, since the values of a function's arguments have no device before it runs.
            own = [tf.identity(x) for x in given]
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)

        return self.strategy.run(replica, args=(tensors,))

    def sums(self, tensors: list[Any]) -> list[Tensor]:
        """The sum of each tensor over the workers, which all call it with the same shapes."""
        return self._summed(tensors)

    def agreed(self, value: Any) -> Any:
        return self._sent(0, value)

    def _sent(self, source: int, value: Any) -> Any:
        """The value of one worker: the sum with zeros of the others."""
        data = pickle.dumps(value) if self.rank == source else b""
        count = int(self.sums([tf.constant(len(data))])[0])
        # In powers of two, so that few functions are traced.
        held = np.zeros(1 << max(6, (count - 1).bit_length()), np.int32)
        held[: len(data)] = np.frombuffer(data, np.uint8)
        (found,) = self.sums([tf.constant(held)])
        return pickle.loads(found.numpy()[:count].astype(np.uint8).tobytes())

    def any(self, flag: bool) -> bool:
        return bool(self.sums([tf.constant(int(flag))])[0] > 0)

    def collected(self, value: Any) -> list[Any] | None:
        found = [self._sent(source, value) for source in range(self.size)]
        return found if self.first else None

    def failure(self, error: BaseException) -> str | None:
        try:  # of the coordination service, which has no public name
            context: Any = importlib.import_module("tensorflow.python.eager.context").context()
            context.set_config_key_value(_FAILED, str(self.rank))
        except Exception:  # another one was first, or the first worker, which holds the keys, has ended
            return None
        text, who = " ".join(str(error).split()), f"worker {self.rank} of {self.size}"
        if isinstance(error, tf.errors.OpError) and any(word in text.lower() for word in _LOST):
            return f"{who} lost the connection to another one, which ended without a message ({text[:80]})"
        return text if self.first else f"{who}: {text}"


def join(options: TrainingOptions, started: Launch) -> StrategyWorkers:
    """Join the workers of TF_CONFIG. ValueError: a worker has several GPUs, or another device than it is to use.
    ConnectionError: the workers do not meet."""
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) > 1:
        raise ValueError(
            f"a worker has one GPU, but finds {len(gpus)}: start one for each, with CUDA_VISIBLE_DEVICES of its own"
        )
    if options.device not in ("auto", "cuda" if gpus else "cpu"):
        raise ValueError(
            f"device={options.device}: several workers take auto, or {'cuda' if gpus else 'cpu'}; which devices "
            "there are is set by CUDA_VISIBLE_DEVICES (-1 for none)"
        )
    with _quiet():
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except RuntimeError as error:  # tensors were made before
            raise ValueError(
                f"the workers must be joined before TensorFlow is used otherwise: make the Trainer first ({error})"
            ) from error
        except tf.errors.OpError as error:
            text = " ".join(str(error.message).split())
            raise ConnectionError(
                f"worker {started.rank} of {started.size} does not find the others: {text[:200]}"
            ) from error
    return StrategyWorkers(strategy, started)


@contextlib.contextmanager
def _quiet() -> Any:
    """Without TensorFlow's messages about devices."""
    log = logging.getLogger("tensorflow")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
