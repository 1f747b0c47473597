"""The interface of pipelines to TensorFlow: loading a model, and running it on lists of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf


class Adapter:
    """Runs a TF model on lists of ids, on its device, and returns NumPy arrays."""

    def __init__(self, model: Any, device: Any) -> None:
        self.model = model
        self.accepts = frozenset((*model.arguments, *model.extra))
        if device is not None and (found := found_device(device)) != (held := self.device):
            raise ValueError(
                f"device={device!r}, but the model's weights are on {held}, and Keras cannot move them: "
                f"give the model's name or folder, or load it under tf.device({found!r})"
            )

    @property
    def device(self) -> str:
        """The device of the weights."""
        return _short(self.model.weights[0].value.device)

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return tf.as_dtype(self.model.compute_dtype)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these inputs."""
        options = {"use_cache": False} if "use_cache" in self.accepts else {}
        with tf.device(self.device):
            return self.model(**_arrays(inputs), **options, training=False)

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids from the model's `generate`, one row per sequence."""
        with tf.device(self.device):
            found = self.model.generate(**_arrays(inputs), **options)
        return np.asarray(getattr(found, "sequences", found)).tolist()

    def numpy(self, array: Any) -> np.ndarray:
        """An output as a NumPy array in float32."""
        return array.numpy().astype(np.float32)

    def native(self, array: np.ndarray) -> Any:
        """A NumPy array as a tensor in the model's dtype."""
        return tf.cast(array, self.dtype)


def load(auto: Any, source: Any, device: Any, **options: Any) -> Any:
    """Load a model from a name or folder onto a device."""
    context = contextlib.nullcontext() if device is None else tf.device(found_device(device))
    with context:
        return auto.from_pretrained(source, **options)


def found_device(device: Any) -> str:
    """The device of a name or index, as "GPU:0"; ValueError if there is none."""
    if isinstance(device, int) and not isinstance(device, bool):
        others = [one.name for one in tf.config.list_logical_devices() if one.device_type != "CPU"]
        if device < 0 or (
            device == 0 and not others
        ):  # as in transformers' pipelines: 0 is the first accelerator, if any
            return "CPU:0"
        if device >= len(others):
            raise ValueError(
                f"device={device}: there are {len(others)} accelerators here; use device='cpu' or -1"
            )
        return _short(others[device])
    kind, _, number = _short(str(device)).partition(":")
    here = [_short(one.name) for one in tf.config.list_logical_devices()]
    if (found := f"{kind}:{number or 0}") not in here:
        raise ValueError(
            f"device={device!r} is no device here ({', '.join(here)}); use one of them, 'cpu', a number or -1 for the "
            "CPU"
        )
    return found


def _short(name: str) -> str:
    """Shorten a device name such as "/job:localhost/replica:0/task:0/device:GPU:0" to "GPU:0"."""
    return name.rpartition("/")[2].removeprefix("device:").upper()


def _arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of rows as arrays; lists of arrays, whose shapes may differ, stay lists."""
    return {
        name: rows if isinstance(rows[0], np.ndarray) else np.asarray(rows, np.int32)
        for name, rows in inputs.items()
    }
