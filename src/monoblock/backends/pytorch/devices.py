"""Where weights go: one device, or several through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Placement:
    """The device of each parameter by a `device_map`: None, "auto", a device, or module name -> device.

    Accelerate moves the activations between devices.
    """

    def __init__(self, model: Any, device_map: Any) -> None:
        self.map: dict[str, torch.device] = {}
        self.default = torch.device("cpu")
        match device_map:
            case None:
                self.default = torch.get_default_device()
            case "auto" | "balanced" | "balanced_low_0" | "sequential":
                self.map = self._read(_inferred(model, device_map))
            case str() | int() | torch.device():
                self.default = _device(device_map)
            case Mapping():
                if not device_map:
                    raise ValueError("device_map must name at least one module, got an empty dict")
                self.map = self._read(_checked(model, device_map))
            case _:
                raise ValueError(f"device_map must be 'auto', a device or a dict, got {device_map!r}")

    @staticmethod
    def _read(device_map: Mapping[str, Any]) -> dict[str, torch.device]:
        return {name: _device(device) for name, device in device_map.items()}

    def device(self, path: str) -> torch.device:
        """Where the parameter of that name in the model goes."""
        if not self.map:
            return self.default
        fits = [name for name in self.map if name == "" or path == name or path.startswith(name + ".")]
        if not fits:
            raise ValueError(
                f"device_map gives no device to {path}; add the key '' for all that is not named"
            )
        return self.map[max(fits, key=len)]

    def dispatch(self, model: Any) -> None:
        """Let accelerate move activations, if the weights are on several devices."""
        if len(set(self.map.values())) > 1:
            accelerate = _accelerate()
            accelerate.dispatch_model(model, {name: str(device) for name, device in self.map.items()})
        if self.map:
            model.hf_device_map = {name: str(device) for name, device in self.map.items()}


def _device(device: Any) -> torch.device:
    if device == "disk":
        raise ValueError(
            "device_map: 'disk' is not supported; give the module a device, or load a smaller dtype"
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map names {device!r}, which is no device; try 'cpu', 'cuda:0' or 'auto'"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device_map asks for {found}, but no CUDA GPU is there; use 'cpu' or 'auto'")
    return found


def _inferred(model: Any, strategy: str) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"": "cpu"}
    accelerate = _accelerate()
    memory = accelerate.utils.get_balanced_memory(
        model, no_split_module_classes=model._no_split_modules, low_zero=strategy == "balanced_low_0"
    )
    return accelerate.infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=model._no_split_modules
    )


def _checked(model: nn.Module, device_map: Mapping[str, Any]) -> Mapping[str, Any]:
    """The map; ValueError if it names no module or parameter of the model."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    if not any(name in known for name in device_map):
        raise ValueError(f"device_map names no module of this model: {', '.join(device_map)}")
    return device_map


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(
            'device_map over several devices needs accelerate: pip install "monoblock[torch]"'
        ) from error
    return accelerate
