"""AdamW over a model's trained parameters, with float32 copies of bfloat16 ones, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from monoblock.errors import CheckpointError
from monoblock.training.options import TrainingOptions

_STATES = ("step", "exp_avg", "exp_avg_sq")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and tables, not to norms, vectors and biases (tables of position
    biases included)."""
    return parameter.ndim >= 2 and "bias" not in name


class Optimizer:
    """Steps of AdamW (Loshchilov and Hutter, arXiv 1711.05101). A step of a bfloat16 parameter updates its float32
    copy, since most steps are smaller than half a unit of bfloat16's last bit."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: TrainingOptions) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.clip = options.max_grad_norm
        self.masters = {
            name: nn.Parameter(p.detach().float()) if p.dtype != torch.float32 else p
            for name, p in self.parameters.items()
        }
        groups = [
            {
                "params": [p for name, p in self.masters.items() if decays(name, p) is wanted],
                "weight_decay": options.weight_decay if wanted else 0.0,
            }
            for wanted in (True, False)
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=options.learning_rate,
            betas=(options.mean_decay, options.square_decay),
            eps=options.epsilon,
            fused=all(p.device.type in ("cpu", "cuda") for p in self.masters.values()),
        )

    def gradient_norm(self) -> float:
        """The norm of all gradients, which are then clipped to `max_grad_norm`, unless it is 0."""
        limit = self.clip or float("inf")
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def step(self, learning_rate: float) -> None:
        """Update the parameters, and delete the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        copied = {name: p for name, p in self.parameters.items() if self.masters[name] is not p}
        for name, parameter in copied.items():
            gradient = parameter.grad
            self.masters[name].grad = None if gradient is None else gradient.float()
            parameter.grad = None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in copied.items():
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """The state by `parameter/state`; float32 copies are the state `master`."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.masters.items():
            if parameter is not self.parameters[name]:
                found[f"{name}/master"] = parameter.detach()
            for key, value in self.adamw.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set a stored state. CheckpointError: it is of other parameters."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            if name not in self.masters or part not in (*_STATES, "master"):
                raise CheckpointError(
                    f"the checkpoint's optimizer has {key!r}, which this run does not train"
                )
            shape = () if part == "step" else tuple(self.masters[name].shape)
            if tuple(value.shape) != shape or value.dtype != torch.float32:
                raise CheckpointError(
                    f"the checkpoint's {key!r} is {tuple(value.shape)} of {value.dtype}, expected {shape} of float32"
                )
            states.setdefault(name, {})[part] = value
        with torch.no_grad():
            for name, parts in states.items():
                master = self.masters[name]
                if (stored := parts.pop("master", None)) is not None:
                    master.copy_(stored)
                    self.parameters[name].copy_(master)
                if parts:
                    self.adamw.state[master] = {key: value.to(master.device) for key, value in parts.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators of the CPU and of the device."""
    found: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        found["device"] = module.get_rng_state()
    return found


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the states of the generators. CheckpointError: they are of other devices or invalid."""
    try:
        torch.set_rng_state(state["cpu"])
        if device.type != "cpu":
            module: Any = torch.get_device_module(device)
            module.set_rng_state(state["device"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's random states do not fit {device}: {error}") from None
