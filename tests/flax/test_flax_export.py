"""`jax.export` with symbolic batch and length: one program whose outputs equal the model's for every shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import flax_model
from jax import export
from measure import assert_close

from monoblock.backends.flax import attention

ATOL = 1e-5  # fp32, 2 layers, a different order of summation: measured 4e-6
NAMES = (
    "MptForCausalLM",
    "MistralForSequenceClassification",
    "FuyuForCausalLM",
    "OpenAIGPTDoubleHeadsModel",
    "GPTNeoForCausalLM",
    "MPNetForMultipleChoice",
)


def arrays(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Ids and a mask with padding on the left."""
    ids = np.random.default_rng(1).integers(10, 89, shape).astype(np.int32)
    mask = np.ones(shape, np.int32)
    mask[0, ..., : shape[-1] // 3] = 0
    return ids, mask


@pytest.mark.parametrize("name", NAMES)
def test_symbolic_batch_and_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token; several blocks of queries, longer than every window; in one family also a single block."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    model = flax_model(name)
    choices = (2,) if name in ("OpenAIGPTDoubleHeadsModel", "MPNetForMultipleChoice") else ()

    def run(params: Any, ids: Any, mask: Any) -> Any:
        return model(ids, mask, params=params).to_tuple()

    batch, tokens = export.symbolic_shape("b, n")
    ids = jax.ShapeDtypeStruct((batch, *choices, tokens), jnp.int32)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    program = export.deserialize(export.export(jax.jit(run))(params, ids, ids).serialize())
    shapes = ((1, 1), (3, 7), (2, 29)) if name == NAMES[0] else ((1, 1), (2, 29))
    for rows, count in shapes:
        given = arrays((rows, *choices, count))
        for ours, theirs in zip(program.call(model.params, *given), run(model.params, *given), strict=True):
            assert ours.shape == theirs.shape
            real = given[1].astype(bool) if ours.shape[: 2 + len(choices)] == given[1].shape else ...
            assert_close(f"{name}, exported", ours[real], theirs[real], ATOL)


def test_symbolic_batch() -> None:
    """A static length is split into query blocks, and windows apply."""
    model = flax_model("MistralForCausalLM")
    (batch,) = export.symbolic_shape("b")
    ids = jax.ShapeDtypeStruct((batch, 23), jnp.int32)
    program = export.export(jax.jit(lambda ids: model(ids).logits))(ids)
    given, _ = arrays((4, 23))
    assert_close("exported", program.call(given), model(given).logits, ATOL)
