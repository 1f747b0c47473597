"""Conditions for bypassing PyTorch's dispatcher: native kernels take plain eager tensors only.

Native kernels read the tensors' memory directly, so no tracer, compiler, exporter, functorch transform, dispatch mode,
autocast or tensor subclass may be active. Otherwise PyTorch's operators run. The `*_obstacle` functions return the
reason against a fast path as text, or None.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Buckets, Learned, Rotary

# Plain tensor classes: no subclass that shards, quantises or traces.
ORDINARY = (Tensor, nn.Parameter)


def transformed() -> bool:
    """Whether this call is compiled, exported, traced, or under a functorch transform, a dispatch mode or forward-mode
    differentiation. Then tensors may have no values, and all operators must be PyTorch's."""
    # First, so that a compiler that traces this function sees a constant.
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or traced()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def traced() -> bool:
    """Whether `torch.jit.trace`, or the older ONNX exporter, traces this call."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def differentiated() -> bool:
    """Whether functorch transforms or forward-mode differentiation are active, for which PyTorch's fused attention
    kernels have no rules, or fall back to a loop."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast(device: torch.device) -> bool:
    """Whether autocast chooses the dtypes of operators there."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def readable(*tensors: Tensor | None) -> bool:
    """Whether the host may read values of these tensors: they have memory, and no call is `transformed`."""
    return not transformed() and all(
        type(x) in ORDINARY and x.device.type != "meta" for x in tensors if x is not None
    )


def native(*tensors: Tensor | None, gradient: bool = False) -> bool:
    """Whether a native kernel may take these tensors: `readable` ones on a CPU, outside autocast.

    `gradient`: the kernel has a backward pass; without one, a tensor that requires gradients is not taken.
    """
    if transformed() or torch.is_autocast_enabled("cpu"):
        return False
    graph = not gradient and torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in ORDINARY or not x.is_cpu or x.layout != torch.strided:
            return False
        if graph and x.requires_grad:
            return False
    return True


def altered(module: nn.Module, *, captured: bool = False) -> str | None:
    """The hook or override on this module that calling its class's forward directly would skip; None if there is none.

    `captured`: the module is called during a graph capture, without gradients, so that backward hooks and compilation
    do not matter.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "a forward hook"
    if not captured and (own["_backward_hooks"] or own.get("_backward_pre_hooks")):
        return "a backward hook"
    if "forward" in own:
        return "an overridden forward method"
    if not captured and own.get("_compiled_call_impl") is not None:
        return "a compiled forward"
    return None


def foreign(module: nn.Module) -> str:
    """The description of an unsupported module: adapters by their package, others by their class."""
    kind = type(module)
    package, *path = kind.__module__.split(".")
    if package == "peft":
        tuner = path[1] if path[:1] == ["tuners"] and len(path) > 1 else ""
        return f"{'LoRA' if tuner == 'lora' else tuner} adapter (peft)".lstrip()
    return f"module of the class {kind.__module__}.{kind.__qualname__}"


def hooked_everywhere() -> bool:
    """Whether global module hooks are registered."""
    module = nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


# ---------------------------------------------------------------------------- obstacles of whole models


def module_obstacle(name: str, module: nn.Module, *, known: bool, captured: bool = False) -> str | None:
    """Why a module of a model must be called: it is not `known`, or it is hooked or overridden; None if it need not
    be."""
    where = name or "the model"
    if not known:
        return f"{foreign(module)} in {where}"
    why = altered(module, captured=captured)
    return None if why is None else f"{why} on {where}"


def setting_obstacle(device: torch.device) -> str | None:
    """The global setting of PyTorch (autocast, global hooks) that affects all modules on that device; None if none
    does."""
    if autocast(device):
        return "autocast"
    if hooked_everywhere():
        return "hooks on all modules (torch.nn.modules.module)"
    return None


def spec_obstacle(spec: ArchSpec) -> str | None:
    """The part of the spec for which decode steps are not the same computation at each position; None if there is
    none."""
    learned = spec.position(Learned)
    if not spec.causal:
        return "bidirectional attention"
    if spec.position(Buckets) is not None:
        return "relative position buckets"
    if learned is not None and learned.pad_id is not None:
        return "positions that depend on padding ids"
    if is_dynamic(spec.position(Rotary)):
        return "dynamic RoPE scaling, which changes the rotation of cached keys with the length"
    return None
