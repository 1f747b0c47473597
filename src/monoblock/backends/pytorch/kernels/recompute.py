"""Outputs of norms and activation functions that the backward pass computes again instead of keeping.

A product needs its input for the gradient of its weights. If that input is the output of a norm or an activation
function, whose own backward pass keeps *its* input, the product keeps only that, and computes its input again. Of the
16 w values per token that a layer with an MLP of 4 w would keep, these are 4 w of the activation and 2 w of the norms.

`remember` notes how an output was computed, for as long as the output exists; it changes neither the output nor the
graph. `keep` and `kept` are for the forward and backward passes of products. Values that are computed again have the
same bits, by the same operator. An output that was modified in place is kept itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, distributed, nn
from torch.utils.weak import WeakIdKeyDictionary

from monoblock.backends.pytorch.kernels import dispatch


class Recipe(NamedTuple):
    """How an output was computed: `function(*inputs)`. `version`: the output's, which in-place operators raise."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]
    version: int


_RECIPES: Any = WeakIdKeyDictionary()  # by output


def remember(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """The output, which is `function(*inputs)`. The inputs must be what its own backward pass keeps."""
    if output.requires_grad and output.is_cpu and dispatch.native(output, *inputs, gradient=True):
        if distributed.is_available() and distributed.is_initialized():
            # FSDP frees a norm's weights before the backward pass of a product in another of its groups.
            inputs = tuple(x.detach().clone() if isinstance(x, nn.Parameter) else x for x in inputs)
        _RECIPES[output] = Recipe(function, inputs, output._version)
    return output


def keep(ctx: Any, x: Tensor | None, *others: Tensor | None) -> None:
    """Save `x`, or what it is computed from, and other tensors for the backward pass of a product."""
    recipe = None if x is None else _RECIPES.get(x)
    if x is None or recipe is None or recipe.version != x._version:
        ctx.recipe = None
        ctx.save_for_backward(x, *others)
    else:
        ctx.recipe = recipe.function, len(recipe.inputs)
        ctx.save_for_backward(*recipe.inputs, *others)


def kept(ctx: Any) -> tuple[Any, ...]:
    """The tensors that were given to `keep`."""
    saved = ctx.saved_tensors
    if ctx.recipe is None:
        return saved
    function, count = ctx.recipe
    return function(*saved[:count]), *saved[count:]
