"""Packed documents on TensorFlow: the contract; calls that create a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from contract.documents import MISTRAL, DocumentsContract, bound
from contract.models import Pair
from measure import assert_close
from packed_documents import ids_of, positions, unpacked, unpacked_indices

from monoblock.backends.tf.checked import check_inputs


class TestDocuments(DocumentsContract):
    prefix = "TF"

    def gradients(self, model: Any, ids: Any, weights: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        @tf.function(autograph=False)
        def packed(ids: Any, own: Any) -> Any:
            with tf.GradientTape() as tape:
                total = tf.reduce_sum(model(ids, position_ids=own).logits * weights)
            return tape.gradient(total, model.trainable_variables)

        with tf.GradientTape() as tape:
            logits = model(**unpacked(ids), use_cache=False).logits
            total = tf.reduce_sum(
                tf.gather_nd(logits, np.stack(unpacked_indices(len(ids)), axis=-1)) * weights
            )
        by_row = tape.gradient(total, model.trainable_variables)
        found = packed(tf.constant(ids), tf.constant(positions(model.spec)))

        def by_path(gradients: Any) -> dict[str, Any]:  # None: of image patches, which are not given
            pairs = zip(model.trainable_variables, gradients, strict=True)
            return {v.path: tf.convert_to_tensor(g) for v, g in pairs if g is not None}

        return by_path(found), by_path(by_row)

    def segments(self, model: Any, ids: Any, positions: Any, cache: Any = None) -> Any:
        given = {"input_ids": tf.constant(ids), "position_ids": tf.constant(positions)}
        return check_inputs(model.spec, model.head_spec, given, cache, False).given.get("sequence_id")

    def test_calls_that_create_a_cache(self, pair: Pair) -> None:
        model, ids = pair(MISTRAL)[1], ids_of()
        for use_cache in (False, True):
            found = model(ids, position_ids=positions(model.spec), use_cache=use_cache)
            assert_close("packed, cached", found.logits, self.alone(model, ids), bound(model))
