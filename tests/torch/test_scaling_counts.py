"""`monoblock.scaling` counts weights, cache, gradients, optimizer states and kept activations as they are allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import GENERATING, KIND, MODEL_TYPES, fields
from torch.autograd.graph import saved_tensors_hooks

import monoblock
from monoblock import scaling
from monoblock.backends.pytorch.cache import DynamicCache
from monoblock.backends.pytorch.training.optimizer import Optimizer
from monoblock.families import family_of
from monoblock.scaling import DeviceLayout, Workload
from monoblock.training.options import TrainingOptions

LANGUAGE = [
    name
    for name, kind in KIND.items()
    if kind in ("causal", "masked") and name != "OpenAIGPTDoubleHeadsModel"
]
NO_DROPOUT = {
    "openai-gpt": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mpnet": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def made(name: str, **more: Any) -> Any:
    model_type = MODEL_TYPES[name]
    config = family_of(name).config(**fields(model_type, 8, **NO_DROPOUT.get(model_type, {}), **more))
    return getattr(monoblock, name)(config)


def planned(model: Any, **work: Any) -> scaling.DeviceMemory:
    return scaling.memory(model.spec, model.head_spec, DeviceLayout(), Workload(**work))


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", KIND)
def test_weights(name: str) -> None:
    model = made(name)
    assert planned(model, dtype="float32", context=32).weights == model.get_memory_footprint()
    model = model.to(torch.bfloat16)
    assert planned(model, context=32).weights == model.get_memory_footprint()


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("name", GENERATING)
def test_quantised_weights(name: str, how: str) -> None:
    model = made(name).to(torch.bfloat16).quantize(how)
    assert planned(model, dtype=how, context=32).weights == model.get_memory_footprint()


@pytest.mark.parametrize("context", [20, 60])
@pytest.mark.parametrize("name", [name for name in LANGUAGE if KIND[name] == "causal"])
def test_cache_of_a_prompt(name: str, context: int) -> None:
    model = made(name).eval()
    cache = DynamicCache(config=model.spec)
    with torch.no_grad():
        model(torch.full((3, context), 5), past_key_values=cache, use_cache=True)
    held = nbytes([*cache.keys, *cache.values])
    assert planned(model, dtype="float32", batch=3, context=context).cache == held


def test_windows_bound_the_cache() -> None:
    model = made("MistralForCausalLM", max_position_embeddings=1024)  # windows of 9
    cache = DynamicCache(config=model.spec)
    held = 0
    with torch.no_grad():
        for _ in range(12):
            model.eval()(torch.full((1, 50), 5), past_key_values=cache, use_cache=True)
            held = max(held, nbytes([*cache.keys, *cache.values]))
    found = planned(model, dtype="float32", context=600).cache
    assert held <= found < planned(made("MistralForCausalLM", sliding_window=None), context=600).cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_gradients_and_optimizer(name: str, dtype: str) -> None:
    model = made(name).to(getattr(torch, dtype))
    found = planned(model, dtype=dtype, train=True, context=16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert found.gradients == nbytes(p.grad for p in model.parameters())
    optimizer = Optimizer(dict(model.named_parameters()), TrainingOptions())
    optimizer.step(1e-3)
    state = optimizer.state()
    assert found.optimizer == nbytes(x for key, x in state.items() if not key.endswith("/step"))


@pytest.mark.parametrize("name", [*LANGUAGE, "MptForCausalLM grouped", "MistralForCausalLM ungrouped"])
def test_activations_of_a_layer(name: str) -> None:
    """Within 5%: tables that all layers share, such as masks, are not counted; some norms keep a few values more.
    Outputs of layer norms and activation functions are computed again: kept too, they would be 6 of 16 widths of GPT
    Neo."""
    name, _, variant = name.partition(" ")
    more: dict[str, Any] = {
        "grouped": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
        "ungrouped": {"num_key_value_heads": 8},
    }.get(variant, {})
    rows, context = 8, 48
    layers = {2: 0, 3: 0}
    model: Any = None
    for count in layers:
        key = {"mpt": "n_layers", "openai-gpt": "n_layer"}.get(MODEL_TYPES[name], "num_hidden_layers")
        depth: dict[str, Any] = {key: count}
        if MODEL_TYPES[name] == "gpt_neo":
            depth = {"num_layers": count, "attention_types": [[["local"], count]]}
        model = made(name, **more, **depth)
        layers[count] = _kept(model, rows, context)
    found = scaling.saved_per_token(model.spec, 1, context, 4, recomputed=True)
    assert (layers[3] - layers[2]) / (rows * context) == pytest.approx(found, rel=0.05)


def _kept(model: Any, rows: int, context: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x  # which keeps the address in use
        return x

    cache = {"use_cache": False} if model.spec.causal else {}
    with saved_tensors_hooks(pack, lambda x: x):
        kept = model.train().bare(torch.full((rows, context), 5), **cache)
    del kept
    return sum(x.untyped_storage().nbytes() for address, x in held.items() if address not in own)
