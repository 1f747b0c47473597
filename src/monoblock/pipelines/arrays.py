"""The seam between the pipelines, which work on lists and NumPy, and the framework of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class TorchSeam:
    """Runs a PyTorch model on lists of ids: puts it on its device, makes tensors, and gives NumPy back."""

    framework = "pt"

    def __init__(self, model: Any, device: Any) -> None:
        import torch

        self._torch = torch
        self.model = model
        spread = getattr(model, "hf_device_map", None)
        if spread is not None and device is not None:
            raise ValueError(
                "device and device_map exclude each other: the model is placed by its device_map already"
            )
        if spread is None:
            model.to(self._device(device))
        model.eval()

    def _device(self, device: Any) -> Any:
        torch = self._torch
        if device is None:
            found = torch.accelerator.current_accelerator(check_available=True)
            return found or torch.device("cpu")
        if isinstance(device, int) and not isinstance(device, bool):
            if device < 0:
                return torch.device("cpu")
            found = torch.accelerator.current_accelerator(check_available=True)
            if found is None and device == 0:
                return torch.device("cpu")  # as the hub's pipelines do: 0 is the first accelerator, if any
            if found is None or device >= torch.accelerator.device_count():
                count = 0 if found is None else torch.accelerator.device_count()
                raise ValueError(
                    f"device={device}: there are {count} accelerators here; use device='cpu' or -1"
                )
            return torch.device(found.type, device)
        try:
            found = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device={device!r} is no device; use 'cpu', 'cuda:0', a number or -1 for the CPU"
            ) from error
        if found.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device!r}, but no CUDA GPU is there; use 'cpu'")
        return found

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self.model.device

    @property
    def dtype(self) -> Any:
        """The type of the weights."""
        return self.model.dtype

    def arrays(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Lists of rows as tensors on the model's device; what is a tensor already only moves."""
        torch = self._torch
        made: dict[str, Any] = {}
        for name, value in inputs.items():
            if isinstance(value, list) and value and torch.is_tensor(value[0]):
                made[name] = [self._like(part) for part in value]
            else:
                made[name] = torch.as_tensor(value).to(self.device)
        return made

    def _like(self, part: Any) -> Any:
        """On the model's device, and numbers that are not whole in its type."""
        return part.to(self.device, self.dtype if part.is_floating_point() else part.dtype)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these inputs, without gradients."""
        with self._torch.inference_mode():
            return self.model(**self.arrays(inputs))

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the model's `generate` gives, one row for each sequence."""
        return self.model.generate(**self.arrays(inputs), **options).tolist()

    def numpy(self, array: Any) -> np.ndarray:
        """An output as NumPy, float32."""
        return array.float().cpu().numpy()

    def native(self, array: np.ndarray) -> Any:
        """A NumPy array as the framework's, on the CPU, in the model's type."""
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self.dtype)


def seam(model: Any, device: Any) -> TorchSeam:
    """What runs that model."""
    if getattr(model, "framework", None) != "pt" or not hasattr(model, "row"):
        raise TypeError(
            f"model must be a name, a folder or one of monoblock's models, got {type(model).__name__}"
        )
    return TorchSeam(model, device)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), element by element."""
    return 1 / (1 + np.exp(-scores))
