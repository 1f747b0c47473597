"""Native kernels run on plain eager tensors only; under transforms, tracers and modes PyTorch's operators run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from monoblock.backends.pytorch.kernels import dispatch


class Wrapped(Tensor):
    """A subclass, as of sharded or quantised tensors."""


def test_plain_tensors() -> None:
    x, parameter = torch.ones(3), nn.Parameter(torch.ones(3))
    assert dispatch.native(x, None)
    assert dispatch.readable(x, parameter, None)
    assert not dispatch.native(x, parameter)
    assert dispatch.native(x, parameter, gradient=True)
    with torch.no_grad():
        assert dispatch.native(x, parameter)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, device="meta"), torch.ones(3).as_subclass(Wrapped), torch.eye(3).to_sparse()]
)
def test_other_tensors(tensor: Tensor) -> None:
    assert not dispatch.native(torch.ones(3), tensor)
    assert dispatch.readable(tensor) == (tensor.layout == torch.sparse_coo)


def seen_in(run: Callable[[Callable[[Tensor], Tensor]], Any]) -> tuple[bool, ...]:
    """What the predicates say inside a function that `run` transforms: native, readable, differentiated."""
    found: list[tuple[bool, ...]] = []

    def function(x: Tensor) -> Tensor:
        found.append((dispatch.native(x), dispatch.readable(x), dispatch.differentiated()))
        return x * 2

    run(function)
    return found[-1]


TRANSFORMS: dict[str, tuple[Callable[[Callable[[Tensor], Tensor]], Any], bool]] = {
    "vmap": (lambda f: torch.vmap(f)(torch.ones(2, 3)), True),
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(3)), True),
    "jvp": (lambda f: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),)), True),
    "trace": (lambda f: torch.jit.trace(f, torch.ones(3), check_trace=False), False),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    run, differentiated = TRANSFORMS[name]
    assert seen_in(run) == (False, False, differentiated)


def test_compiled_and_exported() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            states = (
                dispatch.native(x),
                dispatch.readable(x),
                dispatch.transformed(),
                dispatch.differentiated(),
            )
            return x + sum(state << i for i, state in enumerate(states))

    x, expected = torch.zeros(3), torch.full((3,), 4.0)
    assert torch.equal(torch.compile(Module(), backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(Module(), (x,)).module()(x), expected)


@pytest.mark.parametrize(
    ("context", "readable"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), True),
        (lambda: FlopCounterMode(display=False), False),
        (forward_ad.dual_level, False),
        (contextlib.nullcontext, True),
    ],
)
def test_modes(context: Callable[[], Any], readable: bool) -> None:
    x = torch.ones(3)
    with context():
        assert dispatch.native(x) == (context is contextlib.nullcontext)
        assert dispatch.readable(x) == readable


def no_op(*_: Any) -> None:
    """A hook."""


# What is done to a module, how that is called, and whether a captured graph repeats it.
CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str, bool]] = {
    "forward": (lambda m: m.register_forward_hook(no_op), "a forward hook", False),
    "pre-forward": (lambda m: m.register_forward_pre_hook(no_op), "a forward hook", False),
    "backward": (lambda m: m.register_full_backward_hook(no_op), "a backward hook", True),
    "pre-backward": (lambda m: m.register_full_backward_pre_hook(no_op), "a backward hook", True),
    "replaced": (lambda m: setattr(m, "forward", no_op), "an overridden forward method", False),
    "compiled": (lambda m: m.compile(backend="eager"), "a compiled forward", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_modules_are_named(change: str) -> None:
    do, description, repeated = CHANGES[change]
    module = nn.Linear(2, 2)
    assert dispatch.altered(module) is dispatch.module_obstacle("a.b", module, known=True) is None
    do(module)
    assert dispatch.altered(module) == description
    assert dispatch.module_obstacle("a.b", module, known=True) == f"{description} on a.b"
    assert (dispatch.altered(module, captured=True) is None) == repeated
    assert "Linear in the model" in (dispatch.module_obstacle("", module, known=False) or "")
