"""The cache in 8 and 4 bits: exact for the newest tokens, within half a step for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import model

from monoblock import DynamicCache, QuantizedCache
from monoblock.backends.pytorch.generation.quantized_cache import QuantizedBlock

IDS = torch.randint(0, 89, (2, 12), generator=torch.Generator().manual_seed(3))


def filled(cache: Any, tokens: int, steps: int = 1, layers: int = 2) -> tuple[Any, torch.Tensor]:
    """The cache with that many tokens in it, given in `steps` chunks; and what it was given, (b, g, n, d)."""
    x = torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(0))
    for chunk in x.chunk(steps, dim=2):
        for layer in range(layers):
            cache.update(chunk, -chunk, layer)
    return cache, x


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [4, 16])
def test_quantisation_error_is_at_most_half_a_step(bits: int, group: int) -> None:
    x = torch.randn(2, 3, 5, 16) * 7
    packed = QuantizedBlock.of(x, bits, group)
    off = (packed.dequantized(bits, x.dtype) - x).abs().unflatten(-1, (-1, group))
    assert (off <= packed.step / 2 * 1.001).all()  # and a rounding of fp32
    assert packed.codes.numel() == x.numel() * bits // 8
    even = torch.full((1, 1, 1, 16), 3.5)
    assert torch.equal(QuantizedBlock.of(even, bits, group).dequantized(bits, even.dtype), even)


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_new_tokens_are_exact_and_old_ones_close(steps: int) -> None:
    cache, x = filled(QuantizedCache(nbits=8, q_group_size=4, residual_length=8), 40, steps)
    keys, values = cache[1]
    assert cache.get_seq_length() == keys.shape[2] == 40
    assert torch.equal(keys[:, :, -8:], x[:, :, -8:])
    assert torch.equal(values[:, :, -8:], -x[:, :, -8:])
    # Four normal numbers span less than 8; an 8-bit step is then below 8 / 255, and half of it the error.
    assert 0 < (keys - x).abs().max() < 8 / 255 / 2
    assert cache.blocks[0] is not None and cache.blocks[0][0].codes.dtype == torch.uint8


def test_memory() -> None:
    cache, x = filled(QuantizedCache(nbits=4, q_group_size=16, residual_length=16), 512)
    codes, step, low = cache.blocks[0][0].tensors()
    assert codes.nbytes + step.nbytes + low.nbytes + cache.keys[0].nbytes < 0.3 * x.nbytes


@pytest.mark.parametrize("length", [30, 36, 0])
def test_crop_rows_and_repeats(length: int) -> None:
    settings = {"nbits": 8, "q_group_size": 4, "residual_length": 8}
    cache, _ = filled(QuantizedCache(**settings), 40)
    whole = cache[0][0].clone()
    cache.crop(length)
    assert torch.equal(cache[0][0], whole[:, :, :length]) and cache.get_seq_length() == length
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    assert torch.equal(cache[1][0], whole[[1, 0], :, :length])


@pytest.mark.parametrize("kind", ["MptForCausalLM"])
def test_generation(kind: str) -> None:
    plain = model(kind).generate(IDS, max_new_tokens=40)
    exact = {"nbits": 8, "residual_length": 100}
    how = {"max_new_tokens": 40, "cache_implementation": "quantized"}
    assert torch.equal(model(kind).generate(IDS, cache_config=exact, **how), plain)
    out = model(kind).generate(
        IDS,
        cache_config={"nbits": 8, "residual_length": 4},
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    assert isinstance(out.past_key_values, QuantizedCache)
    # The first token comes from the prompt as it is; later scores from packed keys and values, near the exact ones.
    scores = (
        model(kind).generate(IDS, return_dict_in_generate=True, output_scores=True, max_new_tokens=2).scores
    )
    # Keys that are copied into a cache and keys that stay where they are go through sums of another order.
    torch.testing.assert_close(out.scores[0], scores[0], atol=1e-5, rtol=0)
    assert not torch.equal(out.scores[1], scores[1])
    torch.testing.assert_close(out.scores[1], scores[1], atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"nbits": 3}, "nbits must be 8 or 4, got 3"),
        ({"residual_length": 0}, "residual_length of 1 or more"),
        ({"backend": "quanto"}, "cache_config has no 'backend' here; it takes nbits"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        model().generate(IDS, max_new_tokens=2, cache_implementation="quantized", cache_config=settings)


def test_recent_tokens_are_kept_unquantised() -> None:
    cache, x = filled(QuantizedCache(residual_length=20), 40)
    grown, _ = filled(DynamicCache(), 40)
    assert cache.blocks == [None, None]
    assert torch.equal(cache[0][0], grown[0][0]) and torch.equal(cache[0][0], x)
    cache.reset()
    assert cache.get_seq_length() == 0
