"""Training with Keras: without a compiled loss, the model's loss is used, with labels in x or as y."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from monoblock.backends.tf.guards import error_message
from monoblock.heads import KINDS
from monoblock.outputs import ModelOutput

# Labels -> the scores of the output that they refer to.
SCORES = {
    "labels": "logits",
    "mc_labels": "mc_logits",
    "start_positions": "start_logits",
    "end_positions": "end_logits",
}
# Values of compile(loss=...) that select the model's loss.
MODEL_LOSS = (None, "passthrough", "auto_with_warning")

plain = tf.autograph.experimental.do_not_convert


def with_graph_errors(name: str) -> Any:
    """Keras's method, which raises ValueError with the message of a failed check in the graph."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def call(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except tf.errors.InvalidArgumentError as error:
            if (message := error_message(error)) is None:
                raise
        raise ValueError(message)

    return call


class Training(keras.Model):
    """Adds the model's loss to `compile`, `fit`, `evaluate` and `predict`."""

    fit, evaluate, predict = (with_graph_errors(name) for name in ("fit", "evaluate", "predict"))
    train_on_batch, test_on_batch, predict_on_batch = (
        with_graph_errors(f"{name}_on_batch") for name in ("train", "test", "predict")
    )

    own_loss = True

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Keras's method; without a `loss`, the model's loss is used, with labels in x by name or as y."""
        self.own_loss = isinstance(loss, str | None) and loss in MODEL_LOSS
        super().compile(optimizer, None if self.own_loss else loss, *args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the saved model was; Keras does this for classes that do not override `compile`."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras's method; the optimizer is built before the step is traced, which its new variables would do twice."""
        optimizer = self.optimizer
        if self.built and optimizer is not None and not optimizer.built:
            with self.distribute_strategy.scope(), keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    # This code is written for graphs: AutoGraph would only convert it again, slowly.

    @plain
    def train_step(self, data: Any) -> Any:
        return super().train_step(self._arranged(data))

    @plain
    def test_step(self, data: Any) -> Any:
        return super().test_step(self._arranged(data))

    @plain
    def predict_step(self, data: Any) -> Any:
        given, _, _ = self._arranged((keras.utils.unpack_x_y_sample_weight(data)[0],))
        return super().predict_step((given,))

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """With a distribution strategy, Keras builds the state of losses and metrics on the mean of the replicas'
        batches, in which ids are floats; use the first replica's batch instead."""
        strategy = self.distribute_strategy
        for *_, batches in iterator or ():  # after one number, or two since Keras 3.11
            data_batch = keras.tree.map_structure(
                lambda x: strategy.experimental_local_results(x)[0], next(batches)
            )
            break
        super()._maybe_symbolic_build(data_batch=data_batch)

    def _arranged(self, data: Any) -> tuple[dict[str, Any], Any, Any]:
        """x by name, including labels for the model's loss; y for the metrics; sample weights."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        given = {"use_cache": False, **self.bound((x,), {})}  # pyright: ignore[reportAttributeAccessIssue]
        names = self._label_names()
        inside = {name: given.pop(name) for name in names if given.get(name) is not None}
        if y is None and inside:
            y = inside if len(inside) > 1 else next(iter(inside.values()))
        if self.own_loss:
            given |= {**inside, **({} if y is None else self._labels(y))}
        return given, y, weights

    def _label_names(self) -> tuple[str, ...]:
        head = self.row.head  # pyright: ignore[reportAttributeAccessIssue]
        return KINDS[head].labels if head else ()

    def _labels(self, y: Any) -> dict[str, Any]:
        """y by the head's label names."""
        names = self._label_names()
        if isinstance(y, Mapping):
            found = dict(y)
        elif isinstance(y, list | tuple):
            found = dict(zip(names, y, strict=False))
        else:
            found = dict(zip(names[:1], (y,), strict=False))
        if not found or not set(found) <= set(names):
            name = type(self).__name__
            raise ValueError(
                f"{name}'s loss takes the labels {', '.join(names) or '(none: it has no head)'}, got "
                f"{', '.join(found) or type(y).__name__}: use these names, or compile(loss=...)"
            )
        return found

    @plain
    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The mean of the model's losses, or Keras's compiled loss on the scores that y refers to."""
        if not self.own_loss:
            return super().compute_loss(x, y, self.scores(y, y_pred), sample_weight, training)
        found = [loss for loss in (y_pred.get("loss"), y_pred.get("mc_loss")) if loss is not None]
        if not found:
            raise ValueError(
                f"there are no labels ({', '.join(self._label_names())}): give them in x by name or as y, or "
                "compile(loss=...)"
            )
        total = sum(_mean(loss, sample_weight) for loss in found) + sum(self.losses)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return total / replicas if replicas > 1 else total  # gradients are summed over replicas

    @plain
    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Keras's metrics on the scores that y refers to."""
        return super().compute_metrics(x, y, self.scores(y, y_pred), sample_weight)

    def scores(self, y: Any, y_pred: Any) -> Any:
        """The scores of an output that a loss or metric compares with y: in y's structure, or one tensor."""
        if not isinstance(y_pred, ModelOutput):
            return y_pred
        if isinstance(y, Mapping):
            return {name: y_pred[SCORES[name]] for name in self._label_names() if name in y}
        if isinstance(y, list | tuple):
            return type(y)(y_pred[SCORES[name]] for name in self._label_names()[: len(y)])
        return next(y_pred[name] for name in _FIRST if name in y_pred)


# The scores for a y that is one tensor: the first of these in the output.
_FIRST = ("logits", "start_logits", "pooler_output", "last_hidden_state")


def _mean(loss: Any, weights: Any) -> Any:
    if weights is None:
        return tf.reduce_mean(loss)
    weights = tf.cast(tf.reshape(weights, (-1,)), loss.dtype)
    if loss.shape[0] == 1 and weights.shape[0] != 1:
        raise ValueError(
            "sample_weight is per row, but the model's loss is a mean over tokens: set labels to -100 to ignore them, "
            "or compile(loss=...)"
        )
    return tf.reduce_mean(loss * weights)
