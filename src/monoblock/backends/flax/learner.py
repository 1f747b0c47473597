"""What the trainer needs of JAX: a model, steps with optax, evaluation, and the files of a checkpoint with Orbax."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from monoblock.backends.flax.pipeline_adapter import found_device
from monoblock.backends.xla.learner import STATE, Batch, LearnerBase
from monoblock.errors import CheckpointError
from monoblock.generation.buckets import bucket
from monoblock.training.decay import decays


class FlaxLearner(LearnerBase):
    """See `LearnerBase`."""

    prefix: ClassVar[str] = "Flax"

    def load(self, auto: Any, source: str, how: Mapping[str, Any]) -> Any:
        self.device = None if self.options.device == "auto" else found_device(self.options.device)
        return auto.from_pretrained(source, seed=self.options.seed % 2**32, **how)

    def prepare(self, train: bool) -> None:
        options = self.options
        self.params: Any = jax.device_put(self.model.to_fp32(self.model.params), self.device)
        self._key = jax.random.PRNGKey(options.seed % 2**32)
        self._gradients = jax.jit(jax.value_and_grad(partial(self._loss, train=True)))
        self._outputs = jax.jit(self._evaluated)
        if train:
            optax = _package("optax")
            wanted = jax.tree_util.tree_map_with_path(
                lambda path, leaf: decays(jax.tree_util.keystr(path), leaf.ndim), self.params
            )
            self._optimizer = optax.chain(
                optax.scale_by_adam(options.mean_decay, options.square_decay, options.epsilon),
                optax.add_decayed_weights(options.weight_decay, wanted),
            )
            self.state: Any = self._optimizer.init(self.params)
            self._update = jax.jit(self._updated)

    def count(self) -> tuple[int, int]:
        """The numbers of parameters: trained, and all."""
        total = sum(x.size for x in jax.tree.leaves(self.params))
        return total, total

    # ------------------------------------------------------------------ steps

    def gradients(self, batch: Batch, count: int, number: int) -> tuple[float, Any]:
        key = jax.random.fold_in(jax.random.fold_in(self._key, int(self.state[0].count)), number)
        loss, found = self._gradients(self.params, batch, np.float32(count), key)
        return float(loss), found

    def add(self, one: Any, other: Any) -> Any:
        return jax.tree.map(jnp.add, one, other)

    def norm(self, gradients: Any) -> float:
        return float(_package("optax").global_norm(gradients))

    def update(self, gradients: Any, factor: float, learning_rate: float) -> None:
        numbers = np.float32(factor), np.float32(learning_rate)
        self.params, self.state = self._update(self.params, self.state, gradients, *numbers)

    def _updated(self, params: Any, state: Any, gradients: Any, factor: Any, rate: Any) -> tuple[Any, Any]:
        scaled = jax.tree.map(lambda x: x * factor, gradients)
        updates, state = self._optimizer.update(scaled, state, params)
        return jax.tree.map(lambda p, update: p - rate * update, params, updates), state

    def _loss(self, params: Any, batch: Batch, count: Any, key: Any = None, *, train: bool) -> Any:
        """The sum of a batch's losses, divided by `count`."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = self.model(**given, params=params, dropout_rng=key, train=train)
        labels = batch["labels"]
        if self.task.auto == "AutoModelForCausalLM":
            return self.model.compute_loss(out, labels=labels, num_items_in_batch=count)
        return self.model.compute_loss(out, labels=labels) * len(labels) / count

    def length(self, longest: int) -> int:
        """A number for which few programs are compiled."""
        return max(longest, min(bucket(longest), self.task.limit))

    # ------------------------------------------------------------------ evaluation

    def outputs(self, batch: Batch) -> tuple[Any, Any]:
        return self._outputs(self.params, batch)

    def _evaluated(self, params: Any, batch: Batch) -> tuple[Any, Any]:
        loss = self._loss(params, batch, np.float32(1), train=False)
        if self.task.outputs != "logits":
            return loss, None
        return loss, self.model(batch["input_ids"], batch["attention_mask"], params=params).logits

    def generated(self, ids: np.ndarray, **options: Any) -> Any:
        return self.model.generate(ids, params=self.params, **options)

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, params=self.params)
        self.tokenizer.save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        """Write the optimizer's state into a checkpoint. Dropout has the keys of the seed and the step."""
        checkpoint = _package("orbax.checkpoint")
        with checkpoint.StandardCheckpointer() as saver:
            saver.save((folder / STATE).absolute(), self.state)

    def restore(self, folder: Path) -> None:
        """Set the state of a checkpoint, whose weights are loaded already. CheckpointError: it is of other
        parameters."""
        checkpoint = _package("orbax.checkpoint")
        shapes = jax.tree.map(checkpoint.utils.to_shape_dtype_struct, self.state)
        try:
            with checkpoint.StandardCheckpointer() as saver:
                self.state = saver.restore((folder / STATE).absolute(), shapes)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder / STATE} is no state of these parameters: {error}") from error

    def load_weights(self, folder: Path) -> None:
        """Set the weights to those of a folder that `save` wrote."""
        other = type(self.model).from_pretrained(folder, dtype="float32")
        self.params = jax.device_put(other.to_fp32(other.params), self.device)


def _package(name: str) -> Any:
    """optax or Orbax; ImportError with the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'fine-tuning on JAX needs optax and Orbax: pip install "monoblock[train-jax]" ({error})'
        ) from error


LEARNERS: dict[str, type[FlaxLearner]] = {"labels": FlaxLearner}
