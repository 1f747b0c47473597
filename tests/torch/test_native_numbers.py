"""NaN, infinite, denormal and huge inputs affect only their rows, and nothing overflows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import torch
from test_linear import made

import monoblock
from monoblock.backends.pytorch.kernels.linear import quantized_dense
from monoblock.backends.pytorch.quantization import formats

INFINITE = float("inf")
NON_FINITE = {
    "nan": [float("nan")],
    "inf": [INFINITE],
    "-inf": [-INFINITE],
    "both": [INFINITE, -INFINITE],
    "all": [float("nan"), INFINITE, -INFINITE],
}
FINITE = {
    "denormal": 1e-42,
    "whose inverse is infinite": 2e-38,
    "beside that": 1e-36,
    "small": 1e-30,
    "huge": 1e30,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def product(x: torch.Tensor, packed: Any) -> torch.Tensor:
    return quantized_dense(x, packed, None)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", NON_FINITE)
@torch.no_grad()
def test_non_finite_inputs_affect_their_row_only(level: str, kind: str, bits: int) -> None:
    inputs = 200
    packed = formats.pack(made(9, inputs), bits, 64)
    for rows in (1, 3, 20):
        x = made(rows, inputs, seed=1)
        plain = product(x, packed)
        for index in (0, 70, 199):
            changed = x.clone()
            changed[-1, index] = NON_FINITE[kind][0]
            for i, value in enumerate(NON_FINITE[kind]):
                changed[-1, (index + i) % inputs] = value
            y = product(changed, packed)
            assert not y[-1].isfinite().any(), (level, rows, index)
            assert torch.equal(y[:-1], plain[:-1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", FINITE)
@torch.no_grad()
def test_tiny_and_huge_inputs(level: str, kind: str, bits: int) -> None:
    """A group's inputs are off by half a step of 127 at most; the tiniest count as 0."""
    for rows in (1, 3, 20):
        _, error, allowed = of_size(FINITE[kind], rows, bits)
        assert (error <= allowed).all(), (level, rows)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_overflow_gives_non_finite_results(level: str, bits: int) -> None:
    """Sums of a group's inputs, and products with codes, pass float32's largest number long before the result does:
    what they give is then not finite, and never another number."""
    for rows in (1, 3, 20):
        y, error, allowed = of_size(3e38, rows, bits)
        assert (~y.isfinite() | (error <= allowed)).all(), (level, rows)


def of_size(size: float, rows: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A product with inputs of that size, how far it is from the exact one, and how far it may be."""
    inputs = 192
    packed = formats.pack(torch.rand(9, inputs) * 1e-3, bits, 64)
    weight = packed.unpack(torch.float64)
    x = (torch.rand(rows, inputs) * 2 - 1) * size
    y = product(x, packed)
    # Sums of products are made with codes up to 255, of which the middle goes again.
    allowed = (0.5 / 127 + 1e-4) * size * weight.abs().sum(-1) + 1e-36
    return y, (y - x.double() @ weight.T).abs(), allowed


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM", "MptForCausalLM"])
@pytest.mark.parametrize("value", [float("nan"), INFINITE, -3e38])
@torch.no_grad()
def test_models_with_non_finite_weights(level: str, name: str, value: float) -> None:
    """Norms, activations, attention and sampling of a whole model, packed and plain: no fault, and no number lost."""
    import tiny_families

    if name.startswith("Mpt"):
        model: Any = helpers.model(name)
    else:
        model = tiny_families.monoblock_model(name, **tiny_families.fields(tiny_families.CLASSES[name]))
    ids = torch.arange(12).view(1, -1)
    for form in (None, "int8", "int4"):
        if form is not None:
            model = model.dequantize() or model if form == "int4" else model
            model.quantize(form)
        norm = next(p for n, p in model.named_parameters() if "norm" in n or "ln" in n)
        before = norm[0].item()
        norm[0] = value
        logits = model(ids).logits
        assert not logits.isfinite().all() or value == -3e38
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        norm[0] = before
        assert model(ids).logits.isfinite().all()
    assert isinstance(model, monoblock.PreTrainedModel)
