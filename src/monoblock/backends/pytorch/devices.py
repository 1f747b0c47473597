"""Placement of weights: on one device, or on several through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Placement:
    """The device of each parameter by a `device_map`: None, "auto", a device, or module name -> device.

    Accelerate moves the activations between devices.
    """

    def __init__(
        self, model: Any, device_map: Any, max_memory: Any = None, offload_folder: Any = None
    ) -> None:
        self.offload_folder = offload_folder
        if max_memory is not None and not isinstance(device_map, str):
            raise ValueError(
                'max_memory is for device_map="auto" and its like: it has no effect on an explicit map'
            )
        self.map: dict[str, torch.device] = {}
        self.disk: set[str] = set()
        self.default = torch.device("cpu")
        match device_map:
            case None:
                self.default = torch.get_default_device()
            case "auto" | "balanced" | "balanced_low_0" | "sequential":
                self.map = self._read(_inferred(model, device_map, max_memory))
            case str() | int() | torch.device():
                self.default = _device(device_map)
            case Mapping():
                if not device_map:
                    raise ValueError("device_map must name at least one module, got an empty dict")
                self.map = self._read(_checked(model, device_map))
            case _:
                raise ValueError(f"device_map must be 'auto', a device or a dict, got {device_map!r}")

    def _read(self, device_map: Mapping[str, Any]) -> dict[str, torch.device]:
        on_disk = [name for name, device in device_map.items() if str(device) == "disk"]
        if on_disk and self.offload_folder is None:
            raise ValueError(f"device_map puts {on_disk[0]!r} on the disk: give offload_folder= as well")
        self.disk = set(on_disk)
        # Weights for the disk are read into memory first; accelerate writes them.
        return {name: _device("cpu" if name in self.disk else device) for name, device in device_map.items()}

    def device(self, path: str) -> torch.device:
        """The device of the parameter of that name."""
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
        placed = {name: "disk" if name in self.disk else str(device) for name, device in self.map.items()}
        if len(set(placed.values())) > 1 or self.disk:
            _accelerate().dispatch_model(model, placed, offload_dir=self.offload_folder)
        if self.map:
            model.hf_device_map = placed


def named_device(device: Any, option: str, more: str) -> torch.device:
    """The device of that name; ValueError if there is none. `option` and `more` (other values that it takes) are for
    the message."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{option}={device!r} is no device; try 'cpu', 'cuda:0'{more}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option}={device!r}, but no CUDA GPU is there; use 'cpu'")
    return found


def _device(device: Any) -> torch.device:
    return named_device(device, "device_map", " or 'auto'")


def _inferred(model: Any, strategy: str, max_memory: Any) -> dict[str, Any]:
    if not torch.cuda.is_available() and max_memory is None:
        return {"": "cpu"}
    accelerate = _accelerate()
    memory = accelerate.utils.get_balanced_memory(
        model,
        max_memory,
        no_split_module_classes=model._no_split_modules,
        low_zero=strategy == "balanced_low_0",
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
