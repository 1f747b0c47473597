"""LoRA adapters in the native decode step. tests/ecosystem/test_lora_decoding.py uses peft; here a module with the
fields of its LoRA layer replaces it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import rounding
from tiny_lora import Lora, adapt
from torch import Tensor

from monoblock import GPTNeoConfig, GPTNeoForCausalLM, MistralConfig, MistralForCausalLM, native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
IDS = torch.arange(6)[None]


def mistral(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).eval().to(dtype)


def scores(model: Any, ids: Tensor) -> Tensor:
    call: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    out = model.generate(ids, **call, output_scores=True, return_dict_in_generate=True)
    return torch.stack(out.scores)


def compare(model: Any, ids: Tensor, bound: float) -> Tensor:
    """What the native step gives, after a comparison with the modules."""
    assert model.decoding_path() == "native step"
    found = scores(model, ids)
    handle = model.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(found, scores(model, ids), rtol=0, atol=bound)
    handle.remove()
    return found


def bound_of(model: Any) -> float:
    # A product with adapters is three in a row.
    return 2 * rounding(model.spec, model(IDS, output_hidden_states=True))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ranks", [{"one": 1}, {"one": 8, "two": 19}])
def test_adapters_of_some_matrices_of_a_group(rows: int, ranks: dict[str, int]) -> None:
    """v alone of q, k and v; up alone of gate and up; the head."""
    ids = IDS.expand(rows, -1) + torch.arange(rows)[:, None]
    plain = scores(mistral(), ids)
    for names in (["v_proj"], ["up_proj"], ["o_proj", "down_proj"], ["lm_head"], ["q_proj", "gate_proj"]):
        model = mistral()
        adapt(model, names, ranks)
        found = compare(model, ids, bound_of(model))
        assert (found - plain).abs().max() > 0.05


def test_matrices_that_are_one_module() -> None:
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    model = GPTNeoForCausalLM(config).eval()
    adapt(model, ["c_fc", "c_proj", "out_proj"], {"one": 4})
    compare(model, IDS, bound_of(model))


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_adapters_over_packed_matrices(how: str) -> None:
    model = mistral().quantize(how)
    adapt(model, ["q_proj", "v_proj", "down_proj"], {"one": 4})
    plain = mistral().quantize(how)
    # The native step and the modules round the inputs of quantised products at different points, without adapters too.
    handle = plain.register_forward_hook(lambda *_: None)
    modules = scores(plain, IDS)
    handle.remove()
    noise = float((scores(plain, IDS) - modules).abs().max())
    compare(model, IDS, max(8 * noise, bound_of(model)))


def test_bfloat16_adapters_of_a_bfloat16_model() -> None:
    model = mistral(torch.bfloat16)
    adapt(model, ["q_proj", "v_proj", "up_proj"], {"one": 8}, torch.bfloat16)
    assert model.decoding_path() == "native step"
    want = mistral(torch.bfloat16).float()
    adapt(want, ["q_proj", "v_proj", "up_proj"], {"one": 8})
    want.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    found, exact = scores(model, IDS)[1], scores(want, IDS)[1]
    handle = model.register_forward_hook(lambda *_: None)
    modules = scores(model, IDS)[1]
    handle.remove()
    # float32 between the matrices: nearer to the exact scores than modules that round after each.
    assert (found - exact).abs().max() <= 1.5 * (modules - exact).abs().max()


def test_a_change_of_scale_or_adapter_reaches_the_step() -> None:
    model = mistral()
    adapt(model, ["v_proj"], {"one": 4, "two": 4})
    bound = bound_of(model)
    first = compare(model, IDS, bound)
    for module in model.modules():
        if isinstance(module, Lora):
            module.scaling["one"] = 40.0
    second = compare(model, IDS, bound)
    for module in model.modules():
        if isinstance(module, Lora):
            module.active_adapters = ["two"]
    third = compare(model, IDS, bound)
    for module in model.modules():
        if isinstance(module, Lora):
            module.disable_adapters = True
            module.forward = module.base_layer.forward
    assert "overridden forward method" in model.decoding_path()
    assert len({float(x.sum()) for x in (first, second, third)}) == 3


def test_active_dropout_is_an_obstacle() -> None:
    model = mistral()
    model.model.layers[1].self_attn.train()
    assert model.decoding_path() == "dropout in training mode in model.layers.1.self_attn"
    model.train()
    assert model.decoding_path() == "native step"  # `generate` puts the whole model into evaluation mode
