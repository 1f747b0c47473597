"""What training on a CPU keeps for the backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import model as mpt
from measure import assert_close
from packed_documents import NAMES
from tiny_families import CLASSES, fields, monoblock_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import monoblock
from monoblock.backends.pytorch import layers
from monoblock.backends.pytorch.kernels import attention, attention_training, recompute
from monoblock.backends.pytorch.kernels.linear import dense
from monoblock.backends.pytorch.ops import ACT, Kernel, Scope
from monoblock.backends.pytorch.training import losses

torch.set_num_threads(1)


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def neo(layers: int, kind: str, dtype: torch.dtype) -> Any:
    config = monoblock.GPTNeoConfig(
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        intermediate_size=80,
        vocab_size=60,
        attention_types=[[[kind], layers]],
        window_size=200,
        max_position_embeddings=300,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    )
    return monoblock.GPTNeoForCausalLM(config).to(dtype).train()


def kept_bytes(function: Callable[[], Any], parameters: Any = ()) -> int:
    """The bytes of the memory that autograd keeps of a call, besides the parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x  # which keeps the address in use
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = function()
    del out
    return sum(x.untyped_storage().nbytes() for address, x in held.items() if address not in own)


# ---------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_bytes_of_a_layer(kind: str, dtype: torch.dtype) -> None:
    """Per token: the inputs of both norms (2 w), queries, keys and values (3 w), the attention's output (w), and the
    input of the activation (m); the means and deviations of the norms, and a float32 per head. Not the outputs of the
    norms (2 w) and of the activation (m). The tokens are more than the window, and than a block of queries."""
    rows, length, w, m, heads = 2, 270, 32, 80, 4
    ids = torch.full((rows, length), 5)
    found = []
    for count in (2, 3):
        model = neo(count, kind, dtype)
        held = kept_bytes(lambda model=model: model.bare(input_ids=ids, use_cache=False), model.parameters())
        found.append(held)
    item = dtype.itemsize
    assert found[1] - found[0] == rows * length * ((6 * w + m) * item + 4 * item + 4 * heads)


def test_frozen_weights_keep_no_inputs() -> None:
    x, weight = made(2, 20, 8).requires_grad_(), made(6, 8)
    assert kept_bytes(lambda: dense(x * 1, weight, None), [weight]) == 0
    weight.requires_grad_()
    fixed = x.detach()
    assert kept_bytes(lambda: dense(fixed, weight, None)) == fixed.nbytes


# ---------------------------------------------------------------------------- gradients


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(40).view(2, 20) % 50 + 5
    model.zero_grad()
    losses.token_loss(model, {"input_ids": ids}, ids, model.row.head == "causal").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_same_gradients_as_of_kept_outputs(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit."""
    tiny = mpt(name) if name == "MptForCausalLM" else monoblock_model(name, **fields(CLASSES[name]))
    model = tiny.to(dtype).eval()
    found = gradients(model)
    monkeypatch.setattr(layers.recompute, "remember", lambda output, *_: output)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert torch.equal(gradient, expected[key]), key


def test_the_output_is_computed_again() -> None:
    """By the same function, once for each product; the output itself is freed."""
    calls: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return x * 2

    x, weight = made(4, 8).requires_grad_(), made(6, 8).requires_grad_()
    y = dense(recompute.remember(x * 2, double, x), weight, None)
    assert not calls
    y.sum().backward()
    assert len(calls) == 1
    assert weight.grad is not None
    assert_close("weight", weight.grad, (2 * x.detach()).sum(0).expand(6, 8), 1e-5)


def test_an_output_that_is_modified_is_kept() -> None:
    pre, weight = made(2, 4, 8).requires_grad_(), made(6, 8).requires_grad_()
    hidden = layers.Activation("gelu")(pre)
    hidden.mul_(3)
    (found,) = torch.autograd.grad(dense(hidden, weight, None).sum(), weight)
    (expected,) = torch.autograd.grad(F.linear(3 * F.gelu(pre), weight).sum(), weight)
    assert_close("weight", found, expected, 1e-5)


@pytest.mark.parametrize("name", [*ACT, "norm"])
def test_gradients_of_gradients(name: str) -> None:
    """Through a product whose input is computed again."""
    x, weight = made(2, 5, 8).requires_grad_(), made(6, 8, seed=1).requires_grad_()
    module = torch.nn.LayerNorm(8) if name == "norm" else ACT[name]
    ours = layers.LayerNorm(8) if name == "norm" else layers.Activation(name)
    found = []
    for function in (lambda: dense(ours(x), weight, None), lambda: F.linear(module(x), weight)):
        first = torch.autograd.grad(function().pow(3).sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), (x, weight))
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        assert_close(name, a, b, 1e-5 * float(b.detach().abs().max()))


# ---------------------------------------------------------------------------- attention

_VALID = torch.ones(2, 300, dtype=torch.bool)
_VALID[0, :40] = _VALID[1, 250:] = False
_SEGMENTS = (torch.arange(300) >= 100).int().expand(2, -1)
SCOPES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 50},
    "window longer than a block": {"window": 200},
    "padding": {"valid_bk": _VALID},
    "window and padding": {"window": 50, "valid_bk": _VALID},
    "documents": {"segment_bk": _SEGMENTS},
    "bidirectional": {"causal": False},
    "bidirectional, padding": {"causal": False, "valid_bk": _VALID},
}


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("case", SCOPES)
def test_attention(case: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, against the formula in float64; padding on either side."""
    index = torch.arange(300)

    def scope() -> Scope:
        return Scope(index, index, **{"causal": True, "aligned": True, **SCOPES[case]})

    kernel = Kernel(scale=0.3, softcap=None, dropout=0.0)
    heads = [made(2, 300, n * 16, seed=n + i) for i, n in enumerate((4, groups, groups))]
    heads = [x.unflatten(-1, (-1, 16)).transpose(1, 2).requires_grad_() for x in heads]
    wide = [x.detach().double().requires_grad_() for x in heads]
    upstream = made(2, 4, 300, 16, seed=9)
    calls: list[int] = []
    forward = attention_training._forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0].shape[2])
        return forward(*arguments, **options)

    monkeypatch.setattr(attention_training, "_forward", counted)
    out = attention.attend(heads[0], heads[1], heads[2], scope(), kernel)
    found = [out, *torch.autograd.grad(out, heads, upstream)]
    # Each query once, also after the backward pass.
    assert calls == ([300] if case == "bidirectional" else [128, 128, 44])
    exact, _ = attention.attend_eager(wide[0], wide[1], wide[2], scope(), kernel)
    expected = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    for name, a, b in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert_close(name, a, b.float(), 1e-5)  # sums of up to 300 products of size 1: measured 3e-6


def test_attention_in_bfloat16_is_computed_in_float32() -> None:
    index = torch.arange(200)
    heads = [made(1, 2, 200, 16, seed=i, dtype=torch.bfloat16).requires_grad_() for i in range(3)]
    wide = [x.detach().float().requires_grad_() for x in heads]
    upstream = made(1, 2, 200, 16, seed=9, dtype=torch.bfloat16)
    kernel = Kernel(scale=0.3, softcap=None, dropout=0.0)
    found = []
    for own in (heads, wide):
        out = attention.attend(own[0], own[1], own[2], Scope(index, index, True, True), kernel)
        found.append([out, *torch.autograd.grad(out, own, upstream.to(out.dtype))])
    for name, a, b in zip(("out", "q", "k", "v"), *found, strict=True):
        # Rounded once; the backward pass also reads the rounded output.
        scale = float(b.abs().max())
        assert_close(name, a.float(), b, 2**-8 * scale if name == "out" else 2**-7 * scale)


# ---------------------------------------------------------------------------- loss


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_head_has_one_array_of_its_size(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 sums of its gradient, to which products are added by rows, and the gradient itself; the logits' array
    becomes their gradient."""
    model = neo(2, "global", torch.float32)
    head = model.get_output_embeddings().weight.requires_grad_(trained)
    monkeypatch.setattr(losses, "ADDED", 7 * 32)
    monkeypatch.setattr(losses, "CHUNK", 4 * 60 * 5)  # 5 tokens, so that 10 fit
    hidden, labels = made(31, 32).requires_grad_(), torch.arange(31)
    sizes: list[int] = []
    logits: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not out._is_view() and out.numel() >= head.numel():
                sizes.append(out.data_ptr())
            return out

    gradient = losses._loss_and_gradient

    def same(logits_nv: Tensor, labels_n: Tensor, gradient_nv: Tensor) -> Tensor:
        assert logits_nv is gradient_nv
        logits.append(len(logits_nv))
        return gradient(logits_nv, labels_n, gradient_nv)

    monkeypatch.setattr(losses, "_loss_and_gradient", same)
    with Sizes():
        loss = losses.summed_cross_entropy(model, hidden, labels)
    assert len(set(sizes)) == trained
    assert logits == [10, 10, 10, 1]
    wanted = [hidden, head] if trained else [hidden]
    found = torch.autograd.grad(loss, wanted, retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients of this loss exist once"):
        torch.autograd.grad(loss, wanted)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), labels, reduction="sum"), wanted)
    for a, b in zip(found, expected, strict=True):
        assert_close("gradient", a, b, 1e-5)
