"""Several documents packed in one row on JAX: positions that begin anew keep them apart, as on PyTorch."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import flax_model, torch_model
from helpers import PAD
from measure import assert_close, rounding
from packed_documents import (
    COUNT,
    NAMES,
    SEGMENTS,
    expected_hidden,
    ids_of,
    positions,
    unpacked,
    unpacked_indices,
)

from monoblock.backends.flax.checked import check_inputs
from monoblock.backends.xla import checked as shared

MISTRAL = "MistralForCausalLM"


def bound(model: Any) -> float:
    """How far two orders of summation may be apart."""
    return rounding(model.spec, model(ids_of(), output_hidden_states=True))


def alone(model: Any, ids: Any, params: Any = None) -> Any:
    """Logits of the documents of packed rows, each of which was a row by itself."""
    return model(**unpacked(ids), params=params).logits[unpacked_indices(len(ids))]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str) -> None:
    """Those of the documents alone and of the oracle; the same where nothing has values yet."""
    model, ids = flax_model(name), ids_of()
    given = {"position_ids": positions(model.spec)}
    expected = alone(model, ids)
    found = model(ids, **given, output_hidden_states=True)
    assert_close(f"{name} packed", found.logits, expected, bound(model))
    oracle = expected_hidden(torch_model(name), ids, position_ids=given["position_ids"])
    assert_close(f"{name} packed, oracle", found.hidden_states[-1], oracle, bound(model))
    assert_close(f"{name} eager", model(ids, **given, output_attentions=True).logits, expected, bound(model))
    weights = np.random.default_rng(0).standard_normal(expected.shape).astype(np.float32) / expected.size

    def packed(params: Any, positions: Any) -> Any:
        return (model(ids, position_ids=positions, params=params).logits * weights).sum()

    def by_row(params: Any) -> Any:
        return (alone(model, ids, params) * weights).sum()

    gradients = jax.jit(jax.grad(packed))(model.params, given["position_ids"])
    wanted = jax.jit(jax.grad(by_row))(model.params)
    jax.tree.map(lambda a, b: assert_close(f"{name} packed, gradients", a, b, 1e-6), gradients, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_padding(name: str) -> None:
    """One row holds documents and the other none; padding after, before and between documents."""
    model, ids = flax_model(name), ids_of(2)
    expected, own = alone(model, ids), positions(model.spec)
    mixed = np.concatenate((own, own[:, :1] + np.arange(COUNT)))
    whole = jnp.concatenate((expected[:1], model(ids[1:]).logits))
    assert_close(f"{name} packed and not", model(ids, position_ids=mixed).logits, whole, bound(model))
    for padded in (slice(37, None), slice(0, 12), slice(12, 17)):
        mask = np.ones_like(ids)
        mask[0, padded] = 0
        pads = np.where(mask == 0, PAD, ids)
        found = model(pads, attention_mask=mask, position_ids=own.repeat(2, axis=0)).logits
        assert_close(f"{name} packed, padded", found[mask != 0], expected[mask != 0], bound(model))


def test_what_begins_a_document() -> None:
    """A lower or equal position; where none is known to, nothing is compared. With `sequence_id`, both count."""
    model, ids = flax_model(MISTRAL), ids_of()
    head = model.module.head_spec

    def segments(positions: Any, cache: Any = None, **given: Any) -> Any:
        arguments = {"input_ids": ids, "position_ids": positions, **given}
        return check_inputs(model.spec, head, arguments, cache, False).given.get("sequence_id")

    assert segments(np.arange(COUNT)[None] * 3) is None
    np.testing.assert_array_equal(segments(positions(model.spec)), SEGMENTS)
    past = model(ids, past_key_values=model.init_cache(1, 2 * COUNT)).past_key_values
    assert segments(positions(model.spec), past) is None, "a cache holds what came before"
    jumping = np.arange(COUNT)[None] * 3
    traced = jax.jit(lambda x: model(ids, position_ids=x).logits)(jumping)
    assert_close(
        "traced positions of one document", traced, model(ids, position_ids=jumping).logits, bound(model)
    )


def test_packed_rows_with_an_empty_cache() -> None:
    model, ids = flax_model(MISTRAL), ids_of()
    found = model(ids, position_ids=positions(model.spec), past_key_values=model.init_cache(1, COUNT + 4))
    assert_close("packed, cached", found.logits, alone(model, ids), bound(model))


def test_positions_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of a model with distances they are only told where they separate no documents."""
    model, ids = flax_model("MptForCausalLM"), ids_of()
    shared._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="monoblock"):
        model(ids, position_ids=positions(model.spec))
        assert "position_ids" not in caplog.text
        model(ids, position_ids=np.arange(COUNT)[None])
    assert (
        caplog.text.count("position_ids have no effect on a model that encodes positions as distances") == 1
    )
