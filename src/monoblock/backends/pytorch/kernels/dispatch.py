"""Which way a product, a norm, RoPE or attention is computed: what stands in the way of a kernel, in one place."""

from __future__ import annotations

from torch import nn


def altered(module: nn.Module) -> str | None:
    """What makes calling this module more than its class's own forward; None if nothing does."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has a forward hook"
    if own["_backward_hooks"] or own.get("_backward_pre_hooks"):
        return "has a backward hook"
    if "forward" in own:
        return "has a forward of its own"
    if own.get("_compiled_call_impl") is not None:
        return "was compiled for itself"
    return None


def hooked_everywhere() -> bool:
    """Whether hooks on all modules are registered."""
    module = nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )
