"""What the trainer needs of TensorFlow: a model, steps with Keras's AdamW, evaluation, and the files of a checkpoint.

The programs of a step and of an evaluation have dynamic numbers of rows and tokens, so that each is traced once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from monoblock.backends.tf import pipeline_adapter
from monoblock.backends.tf.ops import Tensor
from monoblock.backends.xla.learner import STATE, Batch, LearnerBase, Units, Written
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.errors import CheckpointError
from monoblock.training.decay import decays


class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW, with epsilon added to the root of the corrected mean of squares, as in Adam's Algorithm 1 (Kingma
    and Ba, arXiv 1412.6980) and in PyTorch; Keras adds it before the correction, where it weighs more in the first
    steps. The corrections are computed in float64: in float32, 1 - 0.999 has an error of 5e-5."""

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        step = tf.cast(self.iterations, tf.float64) + 1.0
        decays = tf.constant((self.beta_1, self.beta_2), tf.float64)
        self._corrections = tf.unstack(tf.cast(1.0 - decays**step, tf.float32))
        super().apply(grads, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index, (first, second) = self._get_variable_index(variable), self._corrections
        mean, square = self._momentums[index], self._velocities[index]
        self.assign_add(mean, (gradient - mean) * (1 - self.beta_1))
        self.assign_add(square, (tf.square(gradient) - square) * (1 - self.beta_2))
        root = tf.sqrt(square / second) + self.epsilon
        self.assign_sub(variable, (learning_rate / first) * (mean / root))

    def moments(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Name -> variable of the state; `names`: the names of the variables that are trained."""
        found = {"iterations": self.iterations}
        for name, variable in names.items():
            index = self._get_variable_index(variable)
            found |= {f"{name}/mean": self._momentums[index], f"{name}/square": self._velocities[index]}
        return found


class TFLearner(LearnerBase):
    """See `LearnerBase`."""

    prefix: ClassVar[str] = "TF"

    def load(self, auto: Any, source: str, how: Mapping[str, Any]) -> Any:
        device = None if self.options.device == "auto" else self.options.device
        model = pipeline_adapter.load(auto, source, device, **how)
        self.device = pipeline_adapter.Adapter(model, None).device
        return model

    def prepare(self, train: bool) -> None:
        options, model = self.options, self.model
        used = {name for source in model.sources().values() for name in source.names}
        stored = {name: one for name, one in model.stored_variables().items() if name in used}
        self.variables: dict[str, Any] = {name: one.variable for name, one in stored.items()}
        self._programs: dict[Callable[..., Any], Any] = {}
        if not train:
            return
        self.optimizer = AdamW(
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            beta_1=options.mean_decay,
            beta_2=options.square_decay,
            epsilon=options.epsilon,
        )
        exact = [one.variable for name, one in stored.items() if not decays(name, len(one.shape))]
        self.optimizer.exclude_from_weight_decay(exact)
        with tf.device(self.device):
            self.optimizer.build(list(self.variables.values()))
        self._update = tf.function(self._updated, autograph=False)

    def count(self) -> tuple[int, int]:
        """The numbers of parameters: trained, and all."""
        return sum(int(np.prod(v.shape)) for v in self.variables.values()), self.model.num_parameters()

    # ------------------------------------------------------------------ steps

    def gradients(self, batch: Batch, count: int, number: int) -> tuple[float, Any]:
        if self.model.seeds is not None:
            step: Any = self.optimizer.iterations
            entropy = (self.options.seed % 2**64, int(step.numpy()), number)
            if self.processes.rows > 1:
                entropy += (self.processes.row,)
            self.model.seeds.state.assign(np.random.SeedSequence(entropy).generate_state(2))
        with tf.device(self.device):
            loss, found = self._program(self._differentiated, batch)(batch, tf.constant(count, tf.float32))
        return float(loss), found

    def batch_gradients(self, batch: Units, count: int, number: int) -> tuple[float, Any]:
        row, rows = self.processes.row, self.processes.rows
        own = batch[len(batch) * row // rows : len(batch) * (row + 1) // rows]
        if own:
            return self.gradients(self.inputs(own), count, number)
        with tf.device(self.device):  # the last batch has fewer rows than there are workers
            return 0.0, [tf.zeros(x.shape, x.dtype) for x in self.variables.values()]

    def summed(self, values: list[float], gradients: Any) -> tuple[list[float], Any]:
        if self.processes.size == 1:
            return values, gradients
        with tf.device(self.device):
            losses, *found = self.processes.sums([tf.constant(values), *gradients])
        return losses.numpy().tolist(), found

    def add(self, one: Any, other: Any) -> Any:
        return [x + y for x, y in zip(one, other, strict=True)]

    def norm(self, gradients: Any) -> float:
        return float(tf.linalg.global_norm(gradients))

    def update(self, gradients: Any, factor: float, learning_rate: float) -> None:
        self.optimizer.learning_rate = learning_rate
        with tf.device(self.device):
            self._update(gradients, tf.constant(factor, tf.float32))

    def _updated(self, gradients: list[Tensor], factor: Tensor) -> None:
        self.optimizer.apply([x * factor for x in gradients])

    def _program(self, function: Callable[..., Any], batch: Batch) -> Any:
        """The compiled function of a batch and a count; numbers of rows and tokens are dynamic."""
        if function not in self._programs:
            shapes = {
                name: tf.TensorSpec(
                    (None, *x.shape[1:]) if x.dtype.kind == "f" else (None,) * x.ndim, x.dtype
                )
                for name, x in batch.items()
            }
            signature = (shapes, tf.TensorSpec((), tf.float32))
            self._programs[function] = tf.function(function, signature, autograph=False)
        return self._programs[function]

    def _differentiated(self, batch: dict[str, Tensor], count: Tensor) -> tuple[Tensor, list[Tensor]]:
        variables = [variable.value for variable in self.variables.values()]
        with tf.GradientTape() as tape:
            loss, _ = self._loss(batch, count, train=True)
        found = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return loss, [tf.convert_to_tensor(x) for x in found]  # those of tables are sparse

    def _loss(self, batch: dict[str, Tensor], count: Tensor, *, train: bool) -> tuple[Tensor, Tensor]:
        """The sum of a batch's losses, divided by `count`, and the logits."""
        out = self.model(**batch, num_items_in_batch=count, use_cache=False, return_dict=True, training=train)
        return tf.reduce_mean(out["loss"]), out["logits"]

    # ------------------------------------------------------------------ evaluation

    def outputs(self, batch: Batch) -> tuple[Any, Any]:
        with tf.device(self.device):
            return self._program(self._evaluated, batch)(batch, tf.constant(1.0))

    def _evaluated(self, batch: dict[str, Tensor], count: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, logits = self._loss(batch, count, train=False)
        return loss, logits if self.task.outputs == "logits" else None

    def generated(self, ids: np.ndarray, **options: Any) -> Any:
        with tf.device(self.device):
            return self.model.generate(ids, **options)

    # ------------------------------------------------------------------ files

    def save_state(self, folder: Path) -> None:
        """Write the optimizer's state into a checkpoint. Dropout has seeds of the step."""
        state = {name: x.numpy() for name, x in self.optimizer.moments(self.variables).items()}
        save_tensors(folder / STATE, {name: np.asarray(x) for name, x in state.items()}, framework="np")

    def start_saving(self, folder: Path, *, weights_only: bool = False) -> Written:
        """Write a checkpoint of several workers: the first one writes that of one process."""
        if self.processes.first:
            self.save(folder)
            if not weights_only:
                self.save_state(folder)
        return Written()

    def restore(self, folder: Path) -> None:
        """Set the state of a checkpoint, whose weights are loaded already. CheckpointError: it is of other
        parameters."""
        store = open_store(find_weights(folder / STATE), "np")
        state = self.optimizer.moments(self.variables)
        if other := set(store) ^ state.keys():
            raise CheckpointError(f"{folder / STATE} is no state of these parameters: {min(other)}")
        for name, variable in state.items():
            value = np.asarray(store.tensor(name))
            if value.shape != tuple(variable.shape) or value.dtype != variable.dtype:
                raise CheckpointError(
                    f"{folder / STATE}: {name} is {value.shape} of {value.dtype}, expected {tuple(variable.shape)} of "
                    f"{variable.dtype}"
                )
            variable.assign(value)

    def load_weights(self, folder: Path) -> None:
        """Set the weights to those of a folder that `save` wrote."""
        self.model.load_parameters(open_store(find_weights(folder), "np"))


LEARNERS: dict[str, type[TFLearner]] = {"labels": TFLearner}
