"""Fused q, k, v and gate, up matrices for long generations: logits and tokens are unchanged."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax_models import flax_model, ids_of
from measure import assert_close

from monoblock.backends.flax import decode, fusing, loading, passes

# Class -> the path endings of the fused parameters in its layers. MPNet's have biases.
JOINT = {
    "MistralForCausalLM": {"self_attn/qkv/kernel", "mlp/gate_up/kernel"},
    "GPTNeoForCausalLM": {"attention/qkv/kernel"},
    "MPNetForMaskedLM": {"attn/qkv/kernel", "attn/qkv/bias"},
}
ATOL = 1e-5  # fp32, 2 layers, logits of about 10


def logits(network: Any, params: Any) -> Any:
    return network.apply({"params": params}, ids_of()).logits


@pytest.mark.parametrize("name", JOINT)
def test_logits_with_fused_matrices(name: str) -> None:
    model = flax_model(name)
    network, params = fusing.fuse_projections(model.module, model.params)
    before, after = (loading.flat(tree) for tree in (model.params, params))
    assert {"/".join(path[-3:]) for path in after.keys() - before.keys()} == JOINT[name]
    gone = {path[-2][0] for path in before.keys() - after.keys()}
    assert gone == ({"q", "k", "v", "g", "u"} if "Mistral" in name else {"q", "k", "v"})
    assert sum(x.size for x in after.values()) == sum(x.size for x in before.values())
    assert_close(f"{name}: joint", logits(network, params), logits(model.module, model.params), ATOL)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_fuses_for_long_outputs_only(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fused = flax_model("MistralForCausalLM"), []
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12, "num_beams": beams}

    def counted(network: Any, params: Any) -> Any:
        fused.append(network)
        return fusing.fuse_projections(network, params)

    monkeypatch.setattr(passes, "fuse_projections", counted)
    expected = model.generate(ids_of(), **options).sequences
    assert not fused
    monkeypatch.setattr(decode, "FUSE_FROM", 12)
    assert np.array_equal(model.generate(ids_of(), **options).sequences, expected)
    assert fused == [model.module]


def test_models_that_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families with fused matrices in their files, traced parameters, and large matrices."""
    for name in ("MptForCausalLM", "FuyuForCausalLM"):
        model = flax_model(name)
        assert fusing.fuse_projections(model.module, model.params) == (model.module, model.params)
    model = flax_model("MistralForCausalLM")

    def traced(params: Any) -> Any:
        assert fusing.fuse_projections(model.module, params)[0] is model.module
        return params

    jax.eval_shape(traced, model.params)
    monkeypatch.setattr(fusing, "MAX_GROUP_BYTES", 1000)
    assert fusing.fuse_projections(model.module, model.params)[0] is model.module
