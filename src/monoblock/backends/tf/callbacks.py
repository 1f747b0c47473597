"""Keras callbacks of transformers' TF classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

IGNORED = -100  # padding of labels and scores when batches have different lengths
LABELS = (("labels",), ("start_positions", "end_positions"))


class KerasMetricCallback(keras.callbacks.Callback):
    """Metrics computed in Python (on decoded strings, spans) over a whole data set at the end of each epoch.

    `metric_fn((predictions, labels))` returns a dict of numbers, which are added to the logs. Both arguments are
    arrays, or dicts of arrays by name; batches of different lengths are padded with -100. `eval_dataset`: a batched
    `tf.data.Dataset` or, with `batch_size`, arrays. `output_cols`: names of the outputs to use (default: all but losses
    and caches). `label_cols`: names of the inputs that are labels (default: `labels`, or `start_positions` and
    `end_positions`), if the data set has no y. `predict_with_generate`: predictions are the outputs of `generate` for
    input_ids and attention_mask with `generate_kwargs`, compiled by XLA with `use_xla_generation`."""

    def __init__(
        self,
        metric_fn: Callable[[tuple[Any, Any]], Mapping[str, Any]],
        eval_dataset: Any,
        output_cols: Sequence[str] | None = None,
        label_cols: Sequence[str] | None = None,
        batch_size: int | None = None,
        predict_with_generate: bool = False,
        use_xla_generation: bool = False,
        generate_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(eval_dataset, tf.data.Dataset):
            if batch_size is None:
                raise ValueError("an eval_dataset that is not a tf.data.Dataset needs a batch_size")
            eval_dataset = tf.data.Dataset.from_tensor_slices(eval_dataset).batch(batch_size)
        self.metric_fn, self.eval_dataset, self.output_cols = metric_fn, eval_dataset, output_cols
        self.label_cols = (
            None if label_cols is None else [label_cols] if isinstance(label_cols, str) else label_cols
        )
        self.generates = predict_with_generate
        self.generate_kwargs = {"jit_compile": use_xla_generation, **(generate_kwargs or {})}
        if not self._has_y() and self.label_cols is None:
            self.label_cols = self._found_labels()

    def _has_y(self) -> bool:
        spec = self.eval_dataset.element_spec
        return self.label_cols is None and isinstance(spec, tuple) and len(spec) > 1

    def _found_labels(self) -> tuple[str, ...]:
        spec = self.eval_dataset.element_spec
        inputs = spec[0] if isinstance(spec, tuple) else spec
        names = inputs if isinstance(inputs, Mapping) else {}
        found = next((labels for labels in LABELS if all(name in names for name in labels)), None)
        if found is None:
            raise ValueError(
                f"label_cols: the eval_dataset has no y and none of the default labels (labels, "
                f"start_positions and end_positions): name which of {', '.join(names) or 'its inputs'} they are"
            )
        return found

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Run the model on the data set and add the metrics to the logs."""
        del epoch
        predictions, labels = [], []
        for batch in self.eval_dataset:
            x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
            labels.append(
                _named(y if self.label_cols is None else {name: x[name] for name in self.label_cols})
            )
            predictions.append(self._generated(x) if self.generates else self._predicted(x))
        found = self.metric_fn((_joined(predictions), _joined(labels)))
        if not isinstance(found, Mapping):
            raise TypeError(f"metric_fn must return a dict of numbers, got {type(found).__name__}")
        if logs is not None:
            logs.update({name: float(value) for name, value in found.items()})

    def _generated(self, x: Any) -> dict[str, np.ndarray[Any, Any]]:
        model: Any = self.model
        given = x if isinstance(x, Mapping) else {"input_ids": x}
        inputs = {name: given[name] for name in ("input_ids", "attention_mask") if name in given}
        return _named(model.generate(**inputs, **self.generate_kwargs))

    def _predicted(self, x: Any) -> dict[str, np.ndarray[Any, Any]]:
        model: Any = self.model
        found = _named(model.predict_on_batch(x))
        if self.output_cols is not None:
            return {name: found[name] for name in self.output_cols}
        ignored = ("loss", "mc_loss", "past_key_values", *model.config.keys_to_ignore_at_inference)
        return {name: value for name, value in found.items() if name not in ignored}


def _named(values: Any) -> dict[str, Any]:
    """One array, several, or a dict of arrays, as a dict of NumPy arrays; nested values are left out."""
    if not isinstance(values, Mapping):
        values = dict(enumerate(values)) if isinstance(values, list | tuple) else {0: values}
    return {name: np.asarray(value) for name, value in values.items() if not isinstance(value, list | tuple)}


def _joined(batches: Sequence[Mapping[str, Any]]) -> Any:
    """The rows of all batches concatenated, by name if there are several names."""
    joined = {name: _concatenate_padded([batch[name] for batch in batches]) for name in batches[0]}
    return next(iter(joined.values())) if len(joined) == 1 else joined


def _concatenate_padded(arrays: Sequence[Any]) -> Any:
    """Concatenate arrays, padded to the longest along the second axis."""
    if arrays[0].ndim > 1:
        longest = max(array.shape[1] for array in arrays)
        arrays = [
            np.pad(
                a,
                [(0, longest - a.shape[1]) if i == 1 else (0, 0) for i in range(a.ndim)],
                constant_values=IGNORED,
            )
            for a in arrays
        ]
    return np.concatenate(arrays)
