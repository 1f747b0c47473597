"""The interface for pipelines: loading a model, and running it on lists of rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from monoblock.backends.pytorch.devices import named_device


class Adapter:
    """Runs a PyTorch model on lists of ids: puts it on its device, makes tensors, and gives NumPy back."""

    def __init__(self, model: Any, device: Any) -> None:
        self.model = model
        self.accepts = frozenset([*inspect.signature(model.forward).parameters, *model.extra])
        spread = getattr(model, "hf_device_map", None)
        if spread is not None and device is not None:
            raise ValueError(
                "device and device_map exclude each other: the model is placed by its device_map already"
            )
        if spread is None:
            model.to(found_device(device))
        model.eval()

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these inputs, without gradients."""
        options = {"use_cache": False} if "use_cache" in self.accepts else {}
        with torch.inference_mode():
            tensors = self._tensors(inputs)
            found = self.model.forward_unpadded(tensors)
            return self.model(**tensors, **options) if found is None else found

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the model's `generate` gives, one row for each sequence."""
        return self.model.generate(**self._tensors(inputs), **options).tolist()

    def numpy(self, array: torch.Tensor) -> np.ndarray:
        """An output as NumPy, float32."""
        return array.float().cpu().numpy()

    def native(self, array: np.ndarray) -> torch.Tensor:
        """A NumPy array as a tensor on the CPU, in the model's type."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.dtype)

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Lists of rows as tensors on the model's device; arrays of different shapes, which come in lists, stay so."""
        made: dict[str, Any] = {}
        for name, value in inputs.items():
            if isinstance(value[0], np.ndarray):
                made[name] = [torch.as_tensor(part).to(self.device, self.dtype) for part in value]
            else:
                made[name] = torch.as_tensor(value).to(self.device)
        return made


def load(auto: Any, source: Any, device: Any, **options: Any) -> Any:
    """The model of a name or folder; the adapter puts it on its device."""
    del device
    return auto.from_pretrained(source, **options)


def found_device(device: Any) -> torch.device:
    """The device of that name or number; ValueError if there is none."""
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    if isinstance(device, int) and not isinstance(device, bool):
        if device < 0:
            return torch.device("cpu")
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None and device == 0:
            return torch.device("cpu")  # as transformers' pipelines do: 0 is the first accelerator, if any
        if found is None or device >= torch.accelerator.device_count():
            count = 0 if found is None else torch.accelerator.device_count()
            raise ValueError(f"device={device}: there are {count} accelerators here; use device='cpu' or -1")
        return torch.device(found.type, device)
    return named_device(device, "device", ", a number, or -1 for the CPU")
