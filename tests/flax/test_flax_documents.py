"""Packed documents on JAX: the contract; traced positions, and positions without effect."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
import pytest
from contract.documents import MISTRAL, DocumentsContract, bound
from contract.models import Pair
from measure import assert_close
from packed_documents import COUNT, ids_of, positions, unpacked, unpacked_indices

from monoblock.backends.flax import loading
from monoblock.backends.flax.checked import check_inputs
from monoblock.backends.xla import checked as shared


class TestDocuments(DocumentsContract):
    prefix = "Flax"

    def gradients(self, model: Any, ids: Any, weights: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        def packed(params: Any, positions: Any) -> Any:
            return (model(ids, position_ids=positions, params=params).logits * weights).sum()

        def by_row(params: Any) -> Any:
            logits = model(**unpacked(ids), params=params).logits
            return (logits[unpacked_indices(len(ids))] * weights).sum()

        found = jax.jit(jax.grad(packed))(model.params, positions(model.spec))
        return loading.flat(found), loading.flat(jax.jit(jax.grad(by_row))(model.params))

    def segments(self, model: Any, ids: Any, positions: Any, cache: Any = None) -> Any:
        given = {"input_ids": ids, "position_ids": positions}
        return check_inputs(model.spec, model.module.head_spec, given, cache, False).given.get("sequence_id")

    def test_traced_positions_of_one_document(self, pair: Pair) -> None:
        model, ids = pair(MISTRAL)[1], ids_of()
        jumping = np.arange(COUNT)[None] * 3
        traced = jax.jit(lambda x: model(ids, position_ids=x).logits)(jumping)
        assert_close("traced positions", traced, model(ids, position_ids=jumping).logits, bound(model))

    def test_positions_without_effect_warn(self, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
        """In a model with ALiBi, positions only separate documents: others are warned of, once."""
        model, ids = pair("MptForCausalLM")[1], ids_of()
        shared._warn_once.cache_clear()
        with caplog.at_level(logging.WARNING, logger="monoblock"):
            model(ids, position_ids=positions(model.spec))
            assert "position_ids" not in caplog.text
            model(ids, position_ids=np.arange(COUNT)[None])
        message = "position_ids have no effect on a model that encodes positions as distances"
        assert caplog.text.count(message) == 1
