"""Several documents packed in one row on TensorFlow: positions that begin anew keep them apart, as on PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_pairs
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

from monoblock.backends.tf.checked import check_inputs

MISTRAL = "MistralForCausalLM"


def bound(model: Any) -> float:
    """How far two orders of summation may be apart."""
    return rounding(model.spec, model(ids_of(), output_hidden_states=True))


def alone(model: Any, ids: Any) -> Any:
    """Logits of the documents of packed rows, each of which was a row by itself."""
    return tf.gather_nd(
        model(**unpacked(ids), use_cache=False).logits, np.stack(unpacked_indices(len(ids)), axis=-1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    """Those of the documents alone and of the oracle; the same in a graph, where nothing has values yet."""
    theirs, model = tf_pairs.pair(name, tmp_path)
    ids, own = ids_of(), positions(theirs.spec)
    expected = alone(model, ids)
    found = model(ids, position_ids=own, output_hidden_states=True)
    assert_close(f"{name} packed", found.logits, expected, bound(model))
    oracle = expected_hidden(theirs, ids, position_ids=own)
    assert_close(f"{name} packed, oracle", found.hidden_states[-1], oracle, bound(model))
    eager = model(ids, position_ids=own, output_attentions=True).logits
    assert_close(f"{name} eager", eager, expected, bound(model))
    weights = np.random.default_rng(0).standard_normal(expected.shape).astype(np.float32) / COUNT / 89

    @tf.function(autograph=False)
    def packed(ids: Any, own: Any) -> Any:
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(model(ids, position_ids=own).logits * weights)
        return tape.gradient(total, model.trainable_variables)

    with tf.GradientTape() as tape:
        total = tf.reduce_sum(alone(model, ids) * weights)
    wanted = tape.gradient(total, model.trainable_variables)
    for variable, one, other in zip(
        model.trainable_variables, packed(tf.constant(ids), tf.constant(own)), wanted, strict=True
    ):
        assert (one is None) == (other is None), variable.path  # of image patches, of which none came
        if one is not None:
            one, other = (tf.convert_to_tensor(x) for x in (one, other))
            assert_close(f"{name} packed, gradient of {variable.path}", one, other, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_padding(name: str) -> None:
    """One row holds documents and the other none; padding after, before and between documents."""
    model, ids = tf_pairs.model(name), ids_of(2)
    expected, own = alone(model, ids).numpy(), positions(model.spec)
    mixed = np.concatenate((own, own[:, :1] + np.arange(COUNT)))
    whole = np.concatenate((expected[:1], model(ids[1:]).logits))
    assert_close(f"{name} packed and not", model(ids, position_ids=mixed).logits, whole, bound(model))
    for padded in (slice(37, None), slice(0, 12), slice(12, 17)):
        mask = np.ones_like(ids)
        mask[0, padded] = 0
        pads = np.where(mask == 0, PAD, ids)
        found = model(pads, attention_mask=mask, position_ids=own.repeat(2, axis=0)).logits.numpy()
        assert_close(f"{name} packed, padded", found[mask != 0], expected[mask != 0], bound(model))


def test_what_begins_a_document() -> None:
    """A lower or equal position; where none is known to, nothing is compared. A cache that is only made now holds
    nothing, and one that holds tokens means one document."""
    model, ids = tf_pairs.model(MISTRAL), ids_of()
    own = positions(model.spec)

    def segments(positions: Any, cache: Any = None) -> Any:
        given = {"input_ids": tf.constant(ids), "position_ids": tf.constant(positions)}
        return check_inputs(model.spec, model.head_spec, given, cache, False).given.get("sequence_id")

    assert segments(np.arange(COUNT)[None] * 3) is None
    np.testing.assert_array_equal(segments(own), SEGMENTS)
    for use_cache in (False, True):
        found = model(ids, position_ids=own, use_cache=use_cache)
        assert_close("packed, cached", found.logits, alone(model, ids), bound(model))
    past = model(ids, past_key_values=model.init_cache(1, 2 * COUNT)).past_key_values
    assert segments(own, past) is None
