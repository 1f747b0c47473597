"""Every option of MPT on JAX against tests/oracle.py: with and without padding, in one and several query blocks, with
and without attention outputs, in one pass and in chunks with a cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax_networks import given, network_of, run
from helpers import batch, expected, expected_logits, model
from measure import assert_close
from mpt_cases import CASES, LENGTHS, ROPE, mpt_model

from monoblock.backends.flax import attention
from monoblock.backends.flax.cache import init_cache
from monoblock.backends.xla.inputs import ForwardOptions

# Options that affect keys, values or positions, and therefore a cache.
CACHED = (
    "alibi_bias_max",
    "learned positions",
    "qk_gn, grouped",
    "multiquery",
    "rope",
    "rope, dynamic",
    "sliding window",
    "sliding window of one",
    "sliding window, rope",
    "score cap",
    "all at once",
)
# Options that affect attention, whose weights are compared too.
ATTENDING = {case for case, (attn, _) in CASES.items() if attn} | {"head_dim", "head_dim, odd width"}
# Cases with two layers; one layer compiles in half the time.
DEEP = ("alibi_bias_max", "all at once")
ATOL = 1e-5  # fp32, 2 layers, values of 1 to 10: the PyTorch backend measures 7e-6
WHOLE = ForwardOptions(hidden_states=True)
NEXT = ForwardOptions(fresh=False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of queries where one would suffice."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)


def module_of(case: str) -> Any:
    return mpt_model(case, n_layers=2 if case in DEEP else 1)


@pytest.mark.parametrize("case", CASES)
def test_option(case: str) -> None:
    module = module_of(case)
    network, params = network_of(module)

    def check(padding: str, wanted: ForwardOptions) -> tuple[Any, Any, Any]:
        """Checks the logits; returns the outputs, the oracle's, and the mask."""
        ids, mask = batch(padding, LENGTHS)
        expect = expected(module, ids, mask)
        # Without a mask, options that affect neither keys nor positions get one of ones, to share a program.
        visible = torch.ones_like(ids) if mask is None and case not in CACHED else mask
        out = run(network, params, given(input_ids=ids, attention_mask=visible), None, wanted)
        assert_close(f"{case}, logits", out["logits"], expected_logits(module, expect), ATOL, mask)
        return out, expect, mask

    for padding in ("none", "left", "right"):
        out, expect, mask = check(padding, WHOLE)
        for a, b in zip(out["hidden_states"], expect.hidden_states, strict=True):
            assert_close(f"{case}, states", a, b, ATOL, mask)
    if case not in ATTENDING:
        return
    out, expect, mask = check("right", ForwardOptions(attentions=True))
    for a, b in zip(out["attentions"], expect.attentions, strict=True):
        assert_close(f"{case}, attentions", a.swapaxes(1, 2), b.swapaxes(1, 2), ATOL, mask)


@pytest.mark.parametrize("case", CACHED)
def test_option_cached(case: str) -> None:
    """A sequence in chunks of one and of several tokens, past every window and the end of a rolling cache."""
    # Dynamic angles change as the sequence grows, and deeper layers keep keys of a shorter one: so one layer.
    dynamic = case == "rope, dynamic"
    module = module_of(case)
    network, params = network_of(module)
    ids, mask = batch("left", LENGTHS)
    assert mask is not None
    whole = expected_logits(module, expected(module, ids, mask))
    visible = jnp.pad(jnp.asarray(mask.numpy()), ((0, 0), (0, 7)), constant_values=1)
    cache, logits, start = init_cache(module.spec, 3, 30), [], 0
    for size in (12, 1, 1, 4, 1, 4):
        inputs = {"input_ids": jnp.asarray(ids[:, start : start + size].numpy()), "attention_mask": visible}
        out = run(network, params, inputs, cache, NEXT if start else ForwardOptions())
        cache, start = out["past_key_values"], start + size
        logits.append(out["logits"])
    assert int(cache.length) == 23
    found = np.concatenate(logits, axis=1)
    if dynamic:  # earlier chunks have the angles of a shorter sequence
        found, whole, mask = found[:, -1:], whole[:, -1:], mask[:, -1:]
    assert_close(f"{case}, cached", found, whole, ATOL, mask)


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("positions", [{}, ROPE])
def test_inputs_longer_than_a_query_block(window: int | None, positions: dict[str, bool]) -> None:
    """Blocks that do not divide the length, with all keys or those of the window, equal one block."""
    module = model(attn={**positions, **({"sliding_window_size": window} if window else {})})
    network, params = network_of(module)
    ids, mask = batch("left", (61, 30, 44))
    inputs = given(input_ids=ids, attention_mask=mask)
    blocks = run(network, params, inputs)["logits"]
    run.clear_cache()
    attention.QUERY_BLOCK = 64  # the fixture restores it
    one = run(network, params, inputs)["logits"]
    run.clear_cache()
    assert_close("blocks", blocks, one, ATOL, mask)


def test_packed_documents() -> None:
    """`sequence_id` separates the documents of a packed row, with a cache too."""
    module = model(attn={"attn_uses_sequence_id": True})
    network, params = network_of(module)
    ids, _ = batch("none", (23, 23, 23))
    segments = jnp.asarray(np.repeat([[0] * 9 + [1] * 14], 3, axis=0))
    inputs = {"input_ids": jnp.asarray(ids.numpy()), "sequence_id": segments}
    packed = run(network, params, inputs)["logits"]
    for start, stop in ((0, 9), (9, 23)):
        alone = run(network, params, {"input_ids": inputs["input_ids"][:, start:stop]})["logits"]
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=ATOL)
    cache = init_cache(module.spec, 3, 23)
    out = run(network, params, {k: v[:, :11] for k, v in inputs.items()}, cache, ForwardOptions())
    rest = {"input_ids": inputs["input_ids"][:, 11:], "sequence_id": segments}
    out = run(network, params, rest, out["past_key_values"], NEXT)
    np.testing.assert_allclose(out["logits"], packed[:, 11:], atol=ATOL)
