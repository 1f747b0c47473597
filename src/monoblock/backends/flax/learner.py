"""What the trainer needs of JAX: a model, steps with optax, evaluation, and the files of a checkpoint with Orbax.

On a mesh, perhaps of several processes, parameters, gradients and optimizer states have the shardings of `sharding.py`.
All processes make the same calls with the same rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from monoblock.backends.flax.pipeline_adapter import found_device
from monoblock.backends.flax.placement import put
from monoblock.backends.flax.processes import on_host
from monoblock.backends.xla.learner import STATE, Batch, LearnerBase, Written
from monoblock.errors import CheckpointError
from monoblock.generation.buckets import bucket
from monoblock.training.checkpoints import SHARED
from monoblock.training.decay import decays
from monoblock.training.tasks.base import IGNORED


class FlaxLearner(LearnerBase):
    """See `LearnerBase`."""

    prefix: ClassVar[str] = "Flax"

    @property
    def mesh(self) -> Any:
        """The mesh of the devices; None on one device."""
        return getattr(self.processes, "mesh", None)

    def load(self, auto: Any, source: str, how: Mapping[str, Any]) -> Any:
        self.device: Any = None
        if self.mesh is not None:
            how = {**how, "mesh": self.mesh, **self.processes.axes}
        elif self.options.device != "auto":
            self.device = found_device(self.options.device)
        return auto.from_pretrained(source, seed=self.options.seed % 2**32, **how)

    def prepare(self, train: bool) -> None:
        options = self.options
        self.params: Any = self._placed(self.model)
        self._key = np.asarray(jax.random.PRNGKey(options.seed % 2**32))
        shards, whole = self._shardings()
        self._gradients = jax.jit(
            jax.value_and_grad(partial(self._loss, train=True)),
            static_argnames="rows",
            out_shardings=(whole, shards),
        )
        self._outputs = jax.jit(self._evaluated, static_argnames="rows", out_shardings=whole)
        if train:
            optax = _package("optax")
            wanted = jax.tree_util.tree_map_with_path(
                lambda path, leaf: decays(jax.tree_util.keystr(path), leaf.ndim), self.params
            )
            self._optimizer = optax.chain(
                optax.scale_by_adam(options.mean_decay, options.square_decay, options.epsilon),
                optax.add_decayed_weights(options.weight_decay, wanted),
            )
            states = None
            if shards is not None:
                states = optax.tree_utils.tree_map_params(
                    self._optimizer,
                    lambda _, sharding: sharding,
                    jax.eval_shape(self._optimizer.init, self.params),
                    shards,
                    transform_non_params=lambda _: whole,
                )
            self.state: Any = jax.jit(self._optimizer.init, out_shardings=states)(self.params)
            self._norm = jax.jit(optax.global_norm, out_shardings=whole)
            self._update = jax.jit(self._updated, out_shardings=(shards, states))

    def _placed(self, model: Any) -> Any:
        """The parameters of a model in float32, on the device or, where they are already, on the mesh."""
        found = model.to_fp32(model.params)
        return found if self.mesh is not None else jax.device_put(found, self.device)

    def _shardings(self) -> tuple[Any, Any]:
        """The shardings of the parameters, and of what all devices have; None without a mesh."""
        if self.mesh is None:
            return None, None
        shards = self.model.param_shardings(self.mesh, **self.processes.axes)
        return shards, NamedSharding(self.mesh, PartitionSpec())

    def count(self) -> tuple[int, int]:
        """The numbers of parameters: trained, and all."""
        total = sum(x.size for x in jax.tree.leaves(self.params))
        return total, total

    # ------------------------------------------------------------------ steps

    def gradients(self, batch: Batch, count: int, number: int) -> tuple[float, Any]:
        key = jax.random.fold_in(jax.random.fold_in(self._key, int(on_host(self.state[0].count))), number)
        given, rows = self._sharded(batch)
        loss, found = self._gradients(self.params, given, np.float32(count), np.asarray(key), rows=rows)
        return float(on_host(loss)), found

    def _sharded(self, batch: Batch) -> tuple[Batch, int]:
        """The batch on the devices, and its number of rows. On a mesh the last row is repeated until the number of rows
        is divisible; the labels of the copies are not in the loss."""
        rows = len(batch["input_ids"])
        if self.mesh is None:
            return batch, rows
        more = -rows % self.processes.row_shards
        found = {name: np.concatenate([x, np.repeat(x[-1:], more, axis=0)]) for name, x in batch.items()}
        if self.task.auto == "AutoModelForCausalLM":
            found["labels"][rows:] = IGNORED
        return self.model.shard_batch(found, self.mesh, **self.processes.axes), rows

    def add(self, one: Any, other: Any) -> Any:
        return jax.tree.map(jnp.add, one, other)

    def norm(self, gradients: Any) -> float:
        return float(on_host(self._norm(gradients)))

    def update(self, gradients: Any, factor: float, learning_rate: float) -> None:
        numbers = np.float32(factor), np.float32(learning_rate)
        self.params, self.state = self._update(self.params, self.state, gradients, *numbers)

    def _updated(self, params: Any, state: Any, gradients: Any, factor: Any, rate: Any) -> tuple[Any, Any]:
        scaled = jax.tree.map(lambda x: x * factor, gradients)
        updates, state = self._optimizer.update(scaled, state, params)
        return jax.tree.map(lambda p, update: p - rate * update, params, updates), state

    def _loss(self, params: Any, batch: Batch, count: Any, key: Any = None, *, rows: int, train: bool) -> Any:
        """The sum of the losses of a batch's first `rows`, divided by `count`."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = self.model(**given, params=params, dropout_rng=key, train=train)
        labels = batch["labels"]
        if self.task.auto == "AutoModelForCausalLM":
            return self.model.compute_loss(out, labels=labels, num_items_in_batch=count)
        if len(labels) > rows:
            out, labels = jax.tree.map(lambda x: x[:rows], (out, labels))
        return self.model.compute_loss(out, labels=labels) * rows / count

    def length(self, longest: int) -> int:
        """A number for which few programs are compiled."""
        return max(longest, min(bucket(longest), self.task.limit))

    # ------------------------------------------------------------------ evaluation

    def outputs(self, batch: Batch) -> tuple[Any, Any]:
        given, rows = self._sharded(batch)
        loss, logits = self._outputs(self.params, given, rows=rows)
        return on_host(loss), None if logits is None else on_host(logits)[:rows]

    def _evaluated(self, params: Any, batch: Batch, *, rows: int) -> tuple[Any, Any]:
        loss = self._loss(params, batch, np.float32(1), rows=rows, train=False)
        if self.task.outputs != "logits":
            return loss, None
        return loss, self.model(batch["input_ids"], batch["attention_mask"], params=params).logits

    def generated(self, ids: np.ndarray, **options: Any) -> Any:
        return self.model.generate(ids, params=self.params, **options)

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, params=self.params)
        if self.processes.first:
            self.tokenizer.save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        """Write the optimizer's state into a checkpoint. Dropout has the keys of the seed and the step."""
        _write(folder / STATE, self.state)

    def start_saving(self, folder: Path, *, weights_only: bool = False) -> Written:
        """Write parameters and optimizer state of several processes, each its shards."""
        _write(folder / SHARED, {"params": self.params} if weights_only else self._states())
        return Written()

    def _states(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state}

    def restore(self, folder: Path) -> None:
        """Set the states of a checkpoint; its weights are loaded already, if one process wrote it. The shardings are
        those of this run. CheckpointError: it is of other parameters."""
        if (folder / SHARED).is_dir():
            found = _read(folder / SHARED, self._states())
            self.params, self.state = found["params"], found["state"]
        else:
            self.state = _read(folder / STATE, self.state)

    def load_weights(self, folder: Path) -> None:
        """Set the weights to those of a folder that `save` or `start_saving` wrote."""
        if (folder / SHARED).is_dir():
            self.params = _read(folder / SHARED, {"params": self.params})["params"]
            return
        other = type(self.model).from_pretrained(folder, dtype="float32")
        found = other.to_fp32(other.params)
        shards, _ = self._shardings()
        self.params = (
            jax.device_put(found, self.device) if shards is None else jax.tree.map(put, found, shards)
        )


def _write(path: Path, tree: Any) -> None:
    with _package("orbax.checkpoint").StandardCheckpointer() as saver:
        saver.save(path.absolute(), tree)


def _read(path: Path, like: Any) -> Any:
    """The tree in a folder, with the shapes, dtypes and shardings of another one. CheckpointError: it has others."""
    checkpoint = _package("orbax.checkpoint")
    shapes = jax.tree.map(checkpoint.utils.to_shape_dtype_struct, like)
    try:
        with checkpoint.StandardCheckpointer() as saver:
            return saver.restore(path.absolute(), shapes)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is no state of these parameters: {error}") from error


def _package(name: str) -> Any:
    """optax or Orbax; ImportError with the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'fine-tuning on JAX needs optax and Orbax: pip install "monoblock[train-jax]" ({error})'
        ) from error


LEARNERS: dict[str, type[FlaxLearner]] = {"labels": FlaxLearner}
