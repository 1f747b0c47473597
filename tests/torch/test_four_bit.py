"""Matrices that stay in 4 bits of bitsandbytes: the numbers of the dequantised ones, to the bit, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bitsandbytes_files import FOUR, IDS, write
from torch import Tensor, nn

from monoblock import AutoModelForCausalLM
from monoblock.backends.pytorch.quantization.four_bit import FourBitLinear

torch.set_num_threads(1)

KINDS = [
    ("nf4", {"blocksize": 64, "compress_statistics": True}),
    ("nf4", {"blocksize": 64, "compress_statistics": False}),
    ("fp4", {"blocksize": 128, "compress_statistics": True}),
    ("nf4", {"blocksize": 64, "quant_storage": torch.bfloat16}),
]


def pair(folder: Path, kind: str, dtype: str = "bfloat16", family: str = "mistral", **options: Any) -> Any:
    """The model with packed matrices, the one with dequantised ones, and their names."""
    names = write(folder, FOUR | {"bnb_4bit_quant_type": kind}, kind, family, **options)
    kept = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, dtype=dtype)
    return kept, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), list(names)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("family", ["mistral", "mpt"])
def test_weights_outputs_and_tokens(
    kind: str, options: dict[str, Any], family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, plain, names = pair(tmp_path, kind, family=family, **options)
    for name in names:
        layer, expected = kept.get_submodule(name), plain.get_submodule(name).weight
        assert isinstance(layer, FourBitLinear) and layer.codes.dtype == torch.uint8
        assert torch.equal(layer.matrix.unpack(torch.bfloat16), expected)
        assert torch.equal(layer.matrix.unpack(torch.float32), expected.float())
        assert layer.weight.shape == expected.shape and layer.weight.dtype == expected.dtype
    assert kept.is_quantized and sum("are dequantised" in r.getMessage() for r in caplog.records) == 1
    with torch.no_grad():
        # In float32; plain matrices of q, k and v are one product, whose kernel may sum in another order.
        torch.testing.assert_close(kept.float()(IDS).logits, plain.float()(IDS).logits, atol=1e-4, rtol=0)
    assert torch.equal(
        kept.generate(IDS, max_new_tokens=3, do_sample=False),
        plain.generate(IDS, max_new_tokens=3, do_sample=False),
    )
    with pytest.raises(ValueError, match="quantised by bitsandbytes cannot be saved here"):
        kept.save_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"this weight is quantised .* call the model's dequantize"):
        kept.get_submodule(names[0]).weight.data.add_(1)
    kept.dequantize()
    assert all(torch.equal(kept.get_submodule(n).weight, plain.get_submodule(n).weight) for n in names)
    assert kept.dtype == torch.float32 and not kept.is_quantized
    kept.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients(dtype: torch.dtype, tmp_path: Path) -> None:
    """Those of nn.Linear with the dequantised weights, to the bit, also with a trained bias."""
    kept, plain, names = pair(tmp_path, "nf4", str(dtype).removeprefix("torch."), blocksize=64)
    for name in names[:7]:
        ours, theirs = kept.get_submodule(name), plain.get_submodule(name)
        for layer in (ours, theirs):
            layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features).to(dtype))
            theirs.weight.requires_grad_(False)
        x = torch.randn(2, 40, ours.in_features).to(dtype)
        found: list[list[Tensor]] = []
        for layer in (ours, theirs):
            own = x.clone().requires_grad_()
            y = layer(own)
            y.backward(torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape))
            assert own.grad is not None and layer.bias.grad is not None
            found.append([y.detach(), own.grad, layer.bias.grad])
        for one, other in zip(*found, strict=True):
            assert one.dtype == dtype and torch.equal(one, other), name


def test_memory(tmp_path: Path) -> None:
    """4 bits and the scales, also in what a forward pass keeps for the backward pass; casts do not change them."""
    kept, plain, names = pair(tmp_path, "nf4", blocksize=64, compress_statistics=True)
    layer = kept.get_submodule(names[-1])
    before = {name: x.clone() for name, x in layer.named_buffers()}
    weights = plain.get_submodule(names[-1]).weight.numel()
    assert layer.codes.nbytes == weights // 2 and layer.absmax.nbytes == -(-weights // 64)
    kept.float()
    assert layer.dtype == torch.float32 == layer.weight.dtype
    assert all(torch.equal(x, before[name]) for name, x in layer.named_buffers())
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(1, layer.in_features, requires_grad=True))
    assert not any(x.numel() >= weights for x in saved)
