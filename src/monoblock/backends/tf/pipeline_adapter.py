"""What a pipeline needs of TensorFlow: loading a model, and running it on lists of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf


class Adapter:
    """Runs a TF model on lists of ids, on its device, and gives NumPy back."""

    def __init__(self, model: Any, device: Any) -> None:
        self.model = model
        self.accepts = frozenset((*model.arguments, *model.extra))
        if device is not None and (found := found_device(device)) != (held := self.device):
            raise ValueError(
                f"device={device!r}, but the model's weights lie on {held}: Keras makes weights where they stay, so "
                f"give the model's name or folder, or load it under tf.device({found!r})"
            )

    @property
    def device(self) -> str:
        """Where the weights are."""
        return _short(self.model.weights[0].value.device)

    @property
    def dtype(self) -> Any:
        """The type of the computation."""
        return tf.as_dtype(self.model.compute_dtype)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these inputs."""
        options = {"use_cache": False} if "use_cache" in self.accepts else {}
        with tf.device(self.device):
            return self.model(**_arrays(inputs), **options, training=False)

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the model's `generate` gives, one row for each sequence."""
        with tf.device(self.device):
            found = self.model.generate(**_arrays(inputs), **options)
        return np.asarray(getattr(found, "sequences", found)).tolist()

    def numpy(self, array: Any) -> np.ndarray:
        """An output as NumPy, float32."""
        return array.numpy().astype(np.float32)

    def native(self, array: np.ndarray) -> Any:
        """A NumPy array as a tensor, in the model's type."""
        return tf.cast(array, self.dtype)


def load(auto: Any, source: Any, device: Any, **options: Any) -> Any:
    """The model of a name or folder, on its device."""
    place = contextlib.nullcontext() if device is None else tf.device(found_device(device))
    with place:
        return auto.from_pretrained(source, **options)


def found_device(device: Any) -> str:
    """The device of that name or number, as "GPU:0"; ValueError if there is none."""
    if isinstance(device, int) and not isinstance(device, bool):
        others = [one.name for one in tf.config.list_logical_devices() if one.device_type != "CPU"]
        if device < 0 or (device == 0 and not others):  # as the hub's pipelines do: 0 is the first, if any
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
    """TensorFlow's name of a device, such as "/job:localhost/replica:0/task:0/device:GPU:0", as "GPU:0"."""
    return name.rpartition("/")[2].removeprefix("device:").upper()


def _arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of rows as arrays; arrays of different shapes, which come in lists, stay so."""
    return {
        name: rows if isinstance(rows[0], np.ndarray) else np.asarray(rows, np.int32)
        for name, rows in inputs.items()
    }
