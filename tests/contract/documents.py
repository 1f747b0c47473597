"""The contract of packed documents: positions that restart separate the documents of a row, as on PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contract.models import Contract, Pair
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

MISTRAL = "MistralForCausalLM"


def bound(model: Any) -> float:
    """The rounding error of two orders of summation."""
    return rounding(model.spec, model(ids_of(), output_hidden_states=True))


class DocumentsContract(Contract):
    def alone(self, model: Any, ids: Any, **given: Any) -> Any:
        """Logits of the documents of packed rows, computed with each document in a row of its own."""
        return np.asarray(model(**unpacked(ids), **given).logits)[unpacked_indices(len(ids))]

    def gradients(self, model: Any, ids: Any, weights: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gradients of the sum of weighted logits by parameter: of packed rows, traced, and of `alone`."""
        raise NotImplementedError

    def segments(self, model: Any, ids: Any, positions: Any, cache: Any = None) -> Any:
        """The document numbers that a call derives from its positions, or None."""
        raise NotImplementedError

    @pytest.mark.parametrize("name", NAMES)
    def test_logits_and_gradients(self, name: str, pair: Pair) -> None:
        """Those of the documents alone, and of the oracle."""
        theirs, model = pair(name)
        ids, own = ids_of(), positions(model.spec)
        expected = self.alone(model, ids)
        found = model(ids, position_ids=own, output_hidden_states=True)
        assert_close(f"{name} packed", found.logits, expected, bound(model))
        oracle = expected_hidden(theirs, ids, position_ids=own)
        assert_close(f"{name} packed, oracle", found.hidden_states[-1], oracle, bound(model))
        eager = model(ids, position_ids=own, output_attentions=True).logits
        assert_close(f"{name} eager", eager, expected, bound(model))
        weights = np.random.default_rng(0).standard_normal(expected.shape).astype(np.float32) / expected.size
        packed, by_row = self.gradients(model, ids, weights)
        assert packed.keys() == by_row.keys()
        for key, gradient in packed.items():
            assert_close(f"{name} packed, gradient of {key}", gradient, by_row[key], 1e-6)

    @pytest.mark.parametrize("name", NAMES)
    def test_rows_and_padding(self, name: str, pair: Pair) -> None:
        """One row holds several documents and the other one; padding after, before and between documents."""
        model, ids = pair(name)[1], ids_of(2)
        expected, own = self.alone(model, ids), positions(model.spec)
        mixed = np.concatenate((own, own[:, :1] + np.arange(COUNT)))
        whole = np.concatenate((expected[:1], model(ids[1:]).logits))
        assert_close(f"{name} packed and not", model(ids, position_ids=mixed).logits, whole, bound(model))
        for padded in (slice(37, None), slice(0, 12), slice(12, 17)):
            mask = np.ones_like(ids)
            mask[0, padded] = 0
            pads = np.where(mask == 0, PAD, ids)
            out = model(pads, attention_mask=mask, position_ids=own.repeat(2, axis=0))
            found = np.asarray(out.logits)
            assert_close(f"{name} packed, padded", found[mask != 0], expected[mask != 0], bound(model))

    def test_documents_begin_where_positions_do_not_increase(self, pair: Pair) -> None:
        """A cache that holds tokens implies one document per row; an empty one does not."""
        model, ids = pair(MISTRAL)[1], ids_of()
        own = positions(model.spec)
        assert self.segments(model, ids, np.arange(COUNT)[None] * 3) is None
        np.testing.assert_array_equal(self.segments(model, ids, own), SEGMENTS)
        out = model(ids, position_ids=own, past_key_values=model.init_cache(1, COUNT + 4))
        assert_close("packed, cached", out.logits, self.alone(model, ids), bound(model))
        past = model(ids, past_key_values=model.init_cache(1, 2 * COUNT)).past_key_values
        assert self.segments(model, ids, own, past) is None
