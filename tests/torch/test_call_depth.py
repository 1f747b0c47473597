"""The number of Python frames of this library between `generate` and a matrix product."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import monoblock
from monoblock import MistralForCausalLM, native
from monoblock.backends.pytorch.kernels import linear

SOURCE = str(Path(monoblock.__file__).parent)
# From `generate` to the matrix product, both counted. A prompt: generate, the loop, the decoder, the model
# with its head, the bare model, a block, its attention or MLP, a matrix, the product. A token: generate, the loop, two
# functions of the decoder, the caller of the native library.
PROMPT, DECODE = 9, 5
# A product with a quantised matrix passes through two more: `quantized_dense`, and the one that its operator calls too.
QUANTIZED = PROMPT + 2
SMALL = monoblock.MistralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=None,
)


def frames() -> tuple[str, ...]:
    """The functions of this library that are running, outermost first."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return tuple(reversed(found))


class Recorded:
    """The native library, or a module of products, whose functions store their callers."""

    def __init__(self, inner: Any, callers: dict[str, set[tuple[str, ...]]]) -> None:
        self.inner, self.callers = inner, callers

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.inner, name)
        if not name.startswith(("mb_linear", "mb_step", "_linear_pointwise")):
            return function

        def called(*given: Any) -> Any:
            self.callers.setdefault(name, set()).add(frames())
            return function(*given)

        return called


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[str, ...]]]:
    """The callers of the library's functions and of PyTorch's products."""
    found: dict[str, set[tuple[str, ...]]] = {}
    if native.library() is not None:
        opened = native._opened()
        monkeypatch.setattr(native, "_opened", lambda: (Recorded(opened[0], found), *opened[1:]))
    monkeypatch.setattr(torch.ops, "mkldnn", Recorded(torch.ops.mkldnn, found))
    plain = F.linear

    def called(*given: Any) -> Any:
        found.setdefault("F.linear", set()).add(frames())
        return plain(*given)

    monkeypatch.setattr(F, "linear", called)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [4, 40], ids=["few rows", "many rows"])
def test_frames_between_generate_and_a_product(
    tokens: int, dtype: torch.dtype, callers: dict[str, set[tuple[str, ...]]]
) -> None:
    model = MistralForCausalLM(SMALL).eval().to(dtype)
    model.generate(torch.arange(tokens)[None], max_new_tokens=3, pad_token_id=0)
    steps = callers.pop("mb_step", set())
    products = set().union(*callers.values())
    # q, k and v, and gate and up, in one product each; out and down; the head.
    assert {chain[-2] for chain in products} >= {"fused", "Linear.forward"} or native.library() is None
    assert {chain[0] for chain in products} == {"TorchGenerationMixin.generate"}
    assert max(map(len, products)) <= PROMPT, max(products, key=len)
    if native.library() is not None:
        assert steps
        assert max(map(len, steps)) <= DECODE, max(steps, key=len)


@pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
def test_frames_between_generate_and_a_quantised_product(callers: dict[str, set[tuple[str, ...]]]) -> None:
    model = MistralForCausalLM(SMALL).eval().quantize("int4")
    model.generate(torch.arange(4)[None], max_new_tokens=1, pad_token_id=0)
    products = callers["mb_linear"]
    assert {chain[-4] for chain in products} == {"fused", "QuantizedLinear.forward"}
    assert max(map(len, products)) <= QUANTIZED, max(products, key=len)


def test_frames_of_a_single_layer(callers: dict[str, set[tuple[str, ...]]]) -> None:
    with torch.no_grad():
        linear.Linear(8, 4)(torch.ones(1, 8))
    chains = set().union(*callers.values())
    assert {chain[0] for chain in chains} == {"Linear.forward"}
    assert max(map(len, chains)) <= 2
