"""AdamW over a model's trained parameters, with float32 copies of bfloat16 ones, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from monoblock.errors import CheckpointError
from monoblock.training.options import TrainingOptions


class Moments(NamedTuple):
    """The state of a parameter: the number of its steps, and the means of its gradients and of their squares."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and tables, not to norms, vectors and biases (tables of position
    biases included)."""
    return parameter.ndim >= 2 and "bias" not in name


class Optimizer:
    """Steps of AdamW (Loshchilov and Hutter, arXiv 1711.05101). A step of a bfloat16 parameter updates its float32
    copy, since most steps are smaller than half a unit of bfloat16's last bit."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: TrainingOptions) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.masters = {
            name: nn.Parameter(p.detach().float()) if p.dtype != torch.float32 else p
            for name, p in self.parameters.items()
        }
        self.moments: dict[str, Moments] = {}
        self.options = options
        self.fused = all(p.device.type in ("cpu", "cuda") for p in self.masters.values())

    def gradient_norm(self) -> float:
        """The norm of all gradients, which are then clipped to `max_grad_norm`, unless it is 0."""
        limit = self.options.max_grad_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def step(self, learning_rate: float) -> None:
        """Update the parameters, and delete the gradients."""
        with torch.no_grad():
            for wanted in (True, False):
                names = [
                    name
                    for name, p in self.parameters.items()
                    if p.grad is not None and decays(name, p) is wanted
                ]
                if names:
                    self._update(names, learning_rate, self.options.weight_decay if wanted else 0.0)
            for name, parameter in self.parameters.items():
                if parameter.grad is not None and self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
                parameter.grad = None

    def _update(self, names: Sequence[str], learning_rate: float, weight_decay: float) -> None:
        """The step of some parameters. The function instead of the class `torch.optim.AdamW`, whose constructor imports
        PyTorch's compiler."""
        for name in names:
            if name not in self.moments:
                like = self.masters[name]
                self.moments[name] = Moments(
                    torch.zeros((), device=like.device if self.fused else None),
                    torch.zeros_like(like, requires_grad=False),
                    torch.zeros_like(like, requires_grad=False),
                )
        found = [self.moments[name] for name in names]
        gradients: list[Any] = [self.parameters[name].grad for name in names]
        adamw(
            [self.masters[name] for name in names],
            [gradient.float() for gradient in gradients],
            [moments.exp_avg for moments in found],
            [moments.exp_avg_sq for moments in found],
            [],
            [moments.step for moments in found],
            fused=self.fused,
            foreach=False,
            amsgrad=False,
            beta1=self.options.mean_decay,
            beta2=self.options.square_decay,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.options.epsilon,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """The state by `parameter/state`; float32 copies are the state `master`."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.masters.items():
            if parameter is not self.parameters[name]:
                found[f"{name}/master"] = parameter.detach()
            if name in self.moments:
                found |= {f"{name}/{key}": value for key, value in self.moments[name]._asdict().items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set a stored state. CheckpointError: it is of other parameters."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            if name not in self.masters or part not in (*Moments._fields, "master"):
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
                if parts and parts.keys() != set(Moments._fields):
                    raise CheckpointError(f"the checkpoint's optimizer lacks a state of {name!r}")
                if parts:
                    self.moments[name] = Moments(
                        **{
                            key: value.to(master.device if key != "step" or self.fused else "cpu")
                            for key, value in parts.items()
                        }
                    )


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
