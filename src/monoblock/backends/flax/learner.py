"""What the trainer needs of JAX: a model, steps with optax, evaluation, and the files of a checkpoint with Orbax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import monoblock
from monoblock.backends.flax.pipeline_adapter import found_device
from monoblock.errors import CheckpointError
from monoblock.generation.buckets import bucket
from monoblock.seeds import set_seed
from monoblock.training.options import TrainingOptions
from monoblock.training.padding import padded
from monoblock.training.tasks.base import Example, NotFinite, Task

_STATE = "training"  # the subfolder of a checkpoint with the optimizer's state
_TINY = 1e-6  # added to the norm that gradients are clipped by, as PyTorch does

Units = Sequence[Sequence[Example]]


class FlaxLearner:
    """A model that is trained, or only evaluated (`train=False`), in float32. The arguments are those of PyTorch's
    `Learner`."""

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        fields: Mapping[str, Any],
        *,
        source: str,
        base: str,
        train: bool = True,
    ) -> None:
        del base  # there is no adapter
        self.task, self.options = task, options
        set_seed(options.seed)
        self.device = None if options.device == "auto" else found_device(options.device)
        where: dict[str, Any] = {"local_files_only": options.offline}
        if options.revision is not None and not Path(source).is_dir():
            where["revision"] = options.revision
        if fields:  # a head for other labels is initialised
            where["ignore_mismatched_sizes"] = True
        auto = getattr(monoblock, f"Flax{task.auto}")
        self.model: Any = auto.from_pretrained(
            source, dtype="float32", seed=options.seed % 2**32, **where, **fields
        )
        if options.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.params: Any = jax.device_put(self.model.to_fp32(self.model.params), self.device)
        self.tokenizer = task.tokenizer
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        self.pad = 0 if pad is None else int(pad)
        self._key = jax.random.PRNGKey(options.seed % 2**32)
        self._gradients = jax.jit(jax.value_and_grad(partial(self._loss, train=True)))
        self._outputs = jax.jit(self._evaluated)
        if train:
            optax = _package("optax")
            decays = jax.tree_util.tree_map_with_path(_decays, self.params)
            self._optimizer = optax.chain(
                optax.scale_by_adam(options.mean_decay, options.square_decay, options.epsilon),
                optax.add_decayed_weights(options.weight_decay, decays),
            )
            self.state: Any = self._optimizer.init(self.params)
            self._update = jax.jit(self._updated)

    def count(self) -> tuple[int, int]:
        """The numbers of parameters: trained, and all."""
        total = sum(x.size for x in jax.tree.leaves(self.params))
        return total, total

    # ------------------------------------------------------------------ steps

    def step(self, units: Sequence[Units], learning_rate: float) -> tuple[float, float]:
        """One step over batches of rows: the mean loss, and the gradients' norm before clipping. NotFinite, before the
        weights change: one of them is no finite number."""
        count = max(1, sum(self.task.weight(e) for batch in units for unit in batch for e in unit))
        done = int(self.state[0].count)
        total, gradients = 0.0, None
        for number, batch in enumerate(units):
            key = jax.random.fold_in(jax.random.fold_in(self._key, done), number)
            loss, found = self._gradients(self.params, self._inputs(batch), np.float32(count), key)
            value = float(loss)
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value}", number)
            gradients = found if gradients is None else jax.tree.map(jnp.add, gradients, found)
            total += value
        norm = float(_package("optax").global_norm(gradients))
        if not math.isfinite(norm):
            raise NotFinite(f"the norm of the gradients is {norm}")
        limit = self.options.max_grad_norm
        factor = min(1.0, limit / (norm + _TINY)) if limit else 1.0
        self.params, self.state = self._update(
            self.params, self.state, gradients, np.float32(factor), np.float32(learning_rate)
        )
        return total, norm

    def _updated(self, params: Any, state: Any, gradients: Any, factor: Any, rate: Any) -> tuple[Any, Any]:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101): p - rate * (m / (sqrt(v) + eps) + decay * p)."""
        scaled = jax.tree.map(lambda x: x * factor, gradients)
        updates, state = self._optimizer.update(scaled, state, params)
        return jax.tree.map(lambda p, update: p - rate * update, params, updates), state

    def _loss(self, params: Any, batch: dict[str, Any], count: Any, key: Any = None, *, train: bool) -> Any:
        """The sum of a batch's losses, divided by `count`."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = self.model(**given, params=params, dropout_rng=key, train=train)
        labels = batch["labels"]
        if self.task.auto == "AutoModelForCausalLM":
            return self.model.compute_loss(out, labels=labels, num_items_in_batch=count)
        return self.model.compute_loss(out, labels=labels) * len(labels) / count

    def _inputs(self, batch: Units) -> dict[str, np.ndarray]:
        """Arrays of a batch, with a number of tokens for which few programs are compiled."""
        rows = [[row for example in unit for row in example.rows] for unit in batch]
        longest = max(sum(len(text.ids) for text in row) for row in rows)
        found = padded(rows, self.pad, max(longest, min(bucket(longest), self.task.limit)))
        labels = found.labels
        if labels is None:
            labels = np.array([unit[0].target for unit in batch])
        kind = np.float32 if labels.dtype.kind == "f" else np.int32
        return {
            "input_ids": found.ids.astype(np.int32),
            "attention_mask": found.mask.astype(np.int32),
            "labels": labels.astype(kind),
        }

    def evaluate(self, examples: Sequence[Example]) -> tuple[float, list[Any]]:
        """The sum of the losses of a batch, and the outputs of each example that the task needs."""
        loss, logits = self._outputs(self.params, self._inputs([[example] for example in examples]))
        if self.task.outputs != "logits":
            return float(loss), [None] * len(examples)
        return float(loss), list(np.asarray(logits))

    def _evaluated(self, params: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        loss = self._loss(params, batch, np.float32(1), train=False)
        if self.task.outputs != "logits":
            return loss, None
        return loss, self.model(batch["input_ids"], batch["attention_mask"], params=params).logits

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The ids, at most `tokens`, that continue a prompt, each the most probable one."""
        found = self.model.generate(
            np.array([list(ids)], np.int32),
            params=self.params,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
        )
        return np.asarray(getattr(found, "sequences", found))[0, len(ids) :].tolist()

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write the model and the tokenizer."""
        self.model.save_pretrained(folder, params=self.params)
        self.tokenizer.save_pretrained(folder)

    def finish(self) -> None:
        """There is no adapter to merge."""

    def save_state(self, folder: Path) -> None:
        """Write the optimizer's state into a checkpoint. Dropout has the keys of the seed and the step."""
        checkpoint = _package("orbax.checkpoint")
        with checkpoint.StandardCheckpointer() as saver:
            saver.save((folder / _STATE).absolute(), self.state)

    def restore(self, folder: Path) -> None:
        """Set the state of a checkpoint, whose weights are loaded already. CheckpointError: it is of other
        parameters."""
        checkpoint = _package("orbax.checkpoint")
        shapes = jax.tree.map(checkpoint.utils.to_shape_dtype_struct, self.state)
        try:
            with checkpoint.StandardCheckpointer() as saver:
                self.state = saver.restore((folder / _STATE).absolute(), shapes)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder / _STATE} is no state of these parameters: {error}") from error

    def load_weights(self, folder: Path) -> None:
        """Set the weights to those of a folder that `save` wrote."""
        other = type(self.model).from_pretrained(folder, dtype="float32")
        self.params = jax.device_put(other.to_fp32(other.params), self.device)


def _decays(path: Any, leaf: Any) -> bool:
    """Whether weight decay applies: to matrices and tables, not to norms, vectors and biases, as on PyTorch."""
    return leaf.ndim >= 2 and not any("bias" in str(getattr(key, "key", key)) for key in path)


def _package(name: str) -> Any:
    """optax or Orbax; ImportError with the pip command."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'fine-tuning on JAX needs optax and Orbax: pip install "monoblock[train-jax]" ({error})'
        ) from error


LEARNERS: dict[str, type[FlaxLearner]] = {"labels": FlaxLearner}
