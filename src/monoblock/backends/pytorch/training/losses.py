"""Losses of training steps. Shape suffixes: n tokens, w width, v vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from monoblock.backends.pytorch import heads
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.kernels.linear import Linear, dense
from monoblock.training.tasks.base import IGNORED

CHUNK = 1 << 25  # bytes of the logits that exist at a time, and as many of gradients
SOFTMAX = 1 << 21  # logits whose softmax is computed at a time in float32; 8 MB
ADDED = 1 << 20  # elements of a gradient that are added to float32 sums at a time


def token_loss(model: Any, given: dict[str, Any], labels_bs: Tensor, causal: bool) -> Tensor:
    """The sum of the cross-entropies of tokens with a label, whose logits exist for a chunk of tokens at a time.
    `causal`: the label of a token is predicted at the token before it."""
    hidden_bsw = model.bare(**given, return_dict=True)[0]
    if causal:
        hidden_bsw, labels_bs = hidden_bsw[:, :-1], labels_bs[:, 1:]
    labelled = labels_bs != IGNORED
    return summed_cross_entropy(model, hidden_bsw[labelled], labels_bs[labelled])


def summed_cross_entropy(model: Any, hidden_nw: Tensor, labels_n: Tensor) -> Tensor:
    """The sum of the cross-entropies of the logits of hidden states, computed in chunks of tokens with their
    gradients."""
    parameters = _head_parameters(model)
    return _ChunkedLoss.apply(model, hidden_nw, labels_n, *parameters)  # pyright: ignore[reportReturnType]


def token_predictions(model: Any, given: dict[str, Any], labels_bs: Tensor) -> tuple[float, Tensor]:
    """The sum of the cross-entropies of tokens with a label, and the most probable class of each of these; -1 for
    others."""
    hidden_bsw = model.bare(**given, return_dict=True)[0]
    labelled = labels_bs != IGNORED
    hidden_nw, labels_n = hidden_bsw[labelled], labels_bs[labelled]
    size, total, best = _chunk(model, hidden_nw), 0.0, []
    for start in range(0, len(hidden_nw), size):
        logits_nv = heads.logits(model, hidden_nw[start : start + size]).float()
        total += float(F.cross_entropy(logits_nv, labels_n[start : start + size], reduction="sum"))
        best.append(logits_nv.argmax(-1))
    found_bs = torch.full_like(labels_bs, -1)
    found_bs[labelled] = torch.cat(best)
    return total, found_bs


def _chunk(model: Any, hidden_nw: Tensor) -> int:
    """The number of tokens whose logits exist at a time."""
    return max(1, CHUNK // (model.spec.vocab * hidden_nw.element_size()))


def _head_parameters(model: Any) -> list[nn.Parameter]:
    """The trained parameters between the hidden states and the logits."""
    found: dict[int, nn.Parameter] = {}
    for role in ("lm_head", "classifier_head", "head_drop", "head_out"):
        if model.has(role):
            for parameter in model.role(role).parameters():
                if parameter.requires_grad:
                    found[id(parameter)] = parameter
    return list(found.values())


def _plain_head(model: Any, hidden_nw: Tensor) -> Linear | None:
    """The matrix of the logits, if these are its products with the hidden states and no more, on a CPU."""
    spec = model.spec
    if model.has("lm_head") or model.has("classifier_head") or not model.has("head_out"):
        return None
    if spec.logit_scale != 1.0 or spec.logit_softcap is not None:
        return None
    modules = [model.role(role) for role in ("head_drop", "head_out") if model.has(role)]
    if any(dispatch.altered(module) for module in modules) or dispatch.hooked_everywhere():
        return None
    *dropouts, head = modules
    if type(head) is not Linear or any(module.p and module.training for module in dropouts):
        return None
    return head if dispatch.native(hidden_nw, head.weight, head.bias, gradient=True) else None


class _ChunkedLoss(torch.autograd.Function):
    """The loss and its gradients in the forward pass, chunk by chunk, so that logits are neither kept nor computed
    again."""

    @staticmethod
    def forward(ctx: Any, model: Any, hidden_nw: Tensor, labels_n: Tensor, *parameters: Tensor) -> Tensor:
        needs = ctx.needs_input_grad
        size = _chunk(model, hidden_nw)
        total = torch.zeros((), dtype=torch.float32, device=hidden_nw.device)
        own = torch.zeros_like(hidden_nw) if needs[1] else None
        # Summed in float32, since bfloat16 would lose the small terms of many chunks.
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        ctx.own, ctx.sums, ctx.dtypes = own, sums, [p.dtype for p in parameters]
        if (head := _plain_head(model, hidden_nw)) is not None:
            trained = [p for p in (head.weight, head.bias) if p is not None and p.requires_grad]
            by_parameter = {id(p): s for p, s in zip(trained, sums, strict=True)}
            to_weight, to_bias = by_parameter.get(id(head.weight)), by_parameter.get(id(head.bias))
            # The gradients replace the logits, so that twice as many fit.
            for start in range(0, len(hidden_nw), 2 * size):
                part = slice(start, start + 2 * size)
                chunk = hidden_nw[part]
                logits_nv = dense(chunk, head.weight, head.bias)
                total += _loss_and_gradient(logits_nv, labels_n[part], logits_nv)
                if own is not None:
                    own[part] = dense(logits_nv, head.weight.t(), None)
                if to_weight is not None:
                    _add_product(logits_nv, chunk, to_weight)
                if to_bias is not None:
                    to_bias += logits_nv.sum(0, dtype=torch.float32)
                del logits_nv  # before the next ones
            return total
        buffer_nv: Tensor | None = None
        for start in range(0, len(hidden_nw), size):
            chunk = hidden_nw[start : start + size].detach()
            with torch.set_grad_enabled(any(needs)):
                chunk.requires_grad_(bool(needs[1]))
                logits_nv = heads.logits(model, chunk)
            if buffer_nv is None:  # pages of a large array are expensive, so that chunks share it
                buffer_nv = torch.empty_like(logits_nv)
            gradient_nv = buffer_nv[: len(chunk)]
            total += _loss_and_gradient(logits_nv.detach(), labels_n[start : start + size], gradient_nv)
            wanted = [*([chunk] if needs[1] else []), *parameters]
            if wanted and logits_nv.requires_grad:
                edge = get_gradient_edge(logits_nv)
                del logits_nv  # their gradients take as much memory
                gradients = list(torch.autograd.grad(edge, wanted, gradient_nv, allow_unused=True))
                if own is not None:
                    own[start : start + size] = gradients.pop(0)
                while gradients:  # freed one by one, before the next chunk's
                    _add(gradients.pop(), sums[len(gradients)])
                del edge
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.sums is None:
            raise RuntimeError(
                "the gradients of this loss exist once: call it again for another backward pass"
            )
        own = None if ctx.own is None else ctx.own.mul_(gradient)
        sums = [s.mul_(gradient).to(dtype) for s, dtype in zip(ctx.sums, ctx.dtypes, strict=True)]
        # No reference remains, so that autograd adds to these the gradient of a tied table in place.
        ctx.own = ctx.sums = None
        return (None, own, None, *sums)


def _add_product(gradient_nv: Tensor, hidden_nw: Tensor, to_vw: Tensor) -> None:
    """Add the gradient of the head's matrix to a float32 sum; by its rows, which stay in the caches."""
    rows = max(1, ADDED // to_vw.shape[1])
    for start in range(0, len(to_vw), rows):
        part = slice(start, start + rows)
        to_vw[part] += dense(gradient_nv[:, part].t(), hidden_nw.t(), None)


def _add(gradient: Tensor | None, to: Tensor) -> None:
    """Add to a float32 sum; by rows, since PyTorch converts an argument of another dtype as a whole."""
    if gradient is None:
        return
    rows = max(1, ADDED // to[0].numel())
    for start in range(0, len(to), rows):
        to[start : start + rows] += gradient[start : start + rows]


def _loss_and_gradient(logits_nv: Tensor, labels_n: Tensor, gradient_nv: Tensor) -> Tensor:
    """The sum of the cross-entropies. `gradient_nv` becomes its gradient: softmax(logits) less one at the labels."""
    total = torch.zeros((), dtype=torch.float32, device=logits_nv.device)
    rows = max(1, SOFTMAX // logits_nv.shape[1])
    for start in range(0, len(logits_nv), rows):
        at = labels_n[start : start + rows, None]
        log_probs = torch.log_softmax(logits_nv[start : start + rows], -1, dtype=torch.float32)
        own = log_probs.gather(1, at)
        total -= own.sum()
        # exp(own) - 1 exactly where the probability is nearly one
        gradient_nv[start : start + rows] = log_probs.exp_().scatter_(1, at, own.expm1())
        del log_probs  # before the next one
    return total
