"""AdamW over a model's trained parameters, with float32 copies of bfloat16 ones, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from monoblock.backends.pytorch.parallel.layout import local
from monoblock.backends.pytorch.training import eight_bit
from monoblock.backends.pytorch.training.eight_bit import QuantizedMoments
from monoblock.errors import CheckpointError
from monoblock.training.decay import decays
from monoblock.training.options import ADAMW_8BIT, TrainingOptions

SLICE = 1 << 19  # parameters that are updated at a time where they have copies: 10 MB with all states


class Moments(NamedTuple):
    """The state of a parameter: the number of its steps, and the means of its gradients and of their squares."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 values of which `split` wrote the halves."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low
    return bits.view(torch.float32)


def split(values: Tensor, high: Tensor, low: Tensor) -> None:
    """Write float32 values as bfloat16, rounded to the nearest (ties away from zero), and as what the rounding left,
    in units of the last bit: at most half of a unit of bfloat16, which are 16 bits with their sign."""
    bits = values.view(torch.int32)
    upper = (bits + (1 << 15)) >> 16
    high.copy_(upper.to(torch.int16).view(torch.bfloat16))
    low.copy_(bits - (upper << 16))


class Optimizer:
    """Steps of AdamW (Loshchilov and Hutter, arXiv 1711.05101). A step of a bfloat16 parameter updates a float32 copy,
    since most steps are smaller than half a unit of bfloat16's last bit. Of the copy only the lower 16 bits are kept,
    less the carry of rounding: the parameter is the upper half. Of a parameter that FSDP2 divides, this process updates
    its part, and has the state of that. With `adamw_8bit` the moments of all but small parameters are quantised."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: TrainingOptions) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name} is {parameter.dtype}; training takes float32 or bfloat16")
        # Contiguous, whatever the parameter's strides: slices are taken of the rows of both.
        self.lows = {
            name: torch.zeros(local(p).shape, dtype=torch.int16, device=p.device)
            for name, p in self.parameters.items()
            if p.dtype == torch.bfloat16
        }
        self.moments: dict[str, Moments | QuantizedMoments] = {}
        self.options = options
        self.fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters.values())
        small = options.optimizer != ADAMW_8BIT
        self.quantized = {
            name for name, p in self.parameters.items() if not small and p.numel() >= eight_bit.LEAST
        }

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
                    if p.grad is not None and decays(name, p.ndim) is wanted
                ]
                if names:
                    self._update(names, learning_rate, self.options.weight_decay if wanted else 0.0)
            for parameter in self.parameters.values():
                parameter.grad = None

    def _update(self, names: Sequence[str], learning_rate: float, weight_decay: float) -> None:
        """The step of some parameters."""
        exact: dict[str, Moments] = {}
        for name in names:
            if name not in self.moments:
                self.moments[name] = self._begun(name)
            moments = self.moments[name]
            if isinstance(moments, QuantizedMoments):
                self._update_quantized(name, moments, learning_rate, weight_decay)
            elif name in self.lows:
                self._update_halves(name, moments, learning_rate, weight_decay)
            else:
                exact[name] = moments
        if exact:
            self._adamw(
                [local(self.parameters[name]) for name in exact],
                [local(_gradient(self.parameters[name])) for name in exact],
                list(exact.values()),
                learning_rate,
                weight_decay,
            )

    def _begun(self, name: str) -> Moments | QuantizedMoments:
        """The state of a parameter before its first step."""
        like = local(self.parameters[name])
        step = torch.zeros((), device=like.device if self.fused else None)
        if name in self.quantized:
            return QuantizedMoments.zeros(like.shape, step, like.device)
        return Moments(
            step, torch.zeros(like.shape, device=like.device), torch.zeros(like.shape, device=like.device)
        )

    def _update_quantized(
        self, name: str, moments: QuantizedMoments, learning_rate: float, weight_decay: float
    ) -> None:
        """The step of a parameter whose moments are quantised; in float32, a slice at a time."""
        parameter = local(self.parameters[name])
        own = parameter if parameter.is_contiguous() else parameter.contiguous()
        flat, gradient = own.view(-1), local(_gradient(self.parameters[name])).reshape(-1)
        low = self.lows[name].view(-1) if name in self.lows else None

        def adamw(part: slice, step: Tensor, mean: Tensor, square: Tensor) -> None:
            master = flat[part] if low is None else joined(flat[part], low[part])
            state = Moments(step, mean, square)
            self._adamw([master], [gradient[part].float()], [state], learning_rate, weight_decay)
            if low is not None:
                split(master, flat[part], low[part])

        moments.update(len(flat), SLICE, adamw)
        if own is not parameter:
            parameter.copy_(own)

    def _update_halves(self, name: str, moments: Moments, learning_rate: float, weight_decay: float) -> None:
        """The step of a bfloat16 parameter, by rows: a slice of all its states stays in the cache."""
        parameter = self.parameters[name]
        gradient = local(_gradient(parameter))
        whole = [local(parameter), self.lows[name], gradient, moments.exp_avg, moments.exp_avg_sq]
        if parameter.ndim == 0:
            whole = [x[None] for x in whole]
        rows = max(1, SLICE // max(1, math.prod(whole[0].shape[1:])))
        step = moments.step + (0 if len(whole[0]) else 1)
        for start in range(0, len(whole[0]), rows):
            own, low, gradient, mean, square = (x[start : start + rows] for x in whole)
            master, step = joined(own, low), moments.step.clone()
            self._adamw(
                [master], [gradient.float()], [Moments(step, mean, square)], learning_rate, weight_decay
            )
            split(master, own, low)
        moments.step.copy_(step)

    def _adamw(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        moments: Sequence[Moments],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """The function instead of the class `torch.optim.AdamW`, whose constructor imports PyTorch's compiler."""
        adamw(
            parameters,
            gradients,
            [found.exp_avg for found in moments],
            [found.exp_avg_sq for found in moments],
            [],
            [found.step for found in moments],
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
        for name, parameter in self.parameters.items():
            if name in self.lows:
                found[f"{name}/master"] = joined(local(parameter), self.lows[name])
            if name in self.moments:
                found |= {f"{name}/{key}": value for key, value in self.moments[name]._asdict().items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set a stored state. CheckpointError: it is of other parameters."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            if name not in self.parameters or (part != "master" and part not in self.kind(name)._fields):
                raise CheckpointError(
                    f"the checkpoint's optimizer has {key!r}, which this run does not train"
                )
            shape, dtype = self.form(key)
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise CheckpointError(
                    f"the checkpoint's {key!r} is {tuple(value.shape)} of {value.dtype}, expected {shape} of {dtype}"
                )
            states.setdefault(name, {})[part] = value
        with torch.no_grad():
            for name, parts in states.items():
                parameter = self.parameters[name]
                stored = parts.pop("master", None)
                if (stored is None) == (name in self.lows):
                    raise CheckpointError(
                        f"the checkpoint's optimizer is of weights in another dtype than {parameter.dtype}: {name}"
                    )
                if stored is not None:
                    split(stored.to(parameter.device), local(parameter), self.lows[name])
                if parts and parts.keys() != set(self.kind(name)._fields):
                    raise CheckpointError(f"the checkpoint's optimizer lacks a state of {name!r}")
                if parts:
                    self.moments[name] = self.kind(name)(
                        **{
                            key: value.to(parameter.device if key != "step" or self.fused else "cpu")
                            for key, value in parts.items()
                        }
                    )

    def kind(self, name: str) -> type[Moments | QuantizedMoments]:
        """The class of a parameter's state."""
        return QuantizedMoments if name in self.quantized else Moments

    def form(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and the dtype of the state `parameter/state` in this process."""
        name, _, part = key.rpartition("/")
        like = local(self.parameters[name])
        if part == "step":
            return (), torch.float32
        if name not in self.quantized or part == "master":
            return tuple(like.shape), torch.float32
        if part.endswith("_scale"):
            return (-(-like.numel() // eight_bit.BLOCK),), torch.float32
        return tuple(like.shape), torch.uint8


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


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
