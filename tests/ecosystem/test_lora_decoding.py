"""LoRA adapters in the native decode step: equal to the PyTorch modules, also after changes of the adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import rounding
from peft import LoraConfig, get_peft_model
from tiny import CAUSAL, LANGUAGE, Library

from monoblock import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")

# All matrices of a layer and the head, by transformers' names.
MATRICES = {
    "mpt": ["Wqkv", "out_proj", "up_proj", "down_proj", "lm_head"],
    "mistral": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "fuyu": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "openai-gpt": ["c_attn", "c_fc", "c_proj"],
    "gpt_neo": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
}
# Ranks that are no multiples of the vector length or of the rows per thread.
RANK = 11
ONE_ROW = torch.arange(5, 12)[None]
CALL: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 1,
    "eos_token_id": None,
    "output_scores": True,
    "return_dict_in_generate": True,
}


def config(family: str, **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=MATRICES[family], r=RANK, lora_alpha=2 * RANK, **options)


def adapted(library: Library, family: str, **options: Any) -> Any:
    """A model with an adapter of large random weights."""
    model = get_peft_model(library.model(LANGUAGE[family], **options), config(family)).eval()
    filled(model, 1)
    return model


def filled(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)


def scores(model: Any, ids: torch.Tensor = ONE_ROW) -> torch.Tensor:
    return torch.stack(model.generate(input_ids=ids, **CALL).scores)


def by_modules(model: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Computes without the native step, which a forward hook disables."""
    handle = model.get_base_model().register_forward_hook(lambda *_: None)
    assert model.get_base_model().decoding_path() == "a forward hook on the model"
    try:
        return compute()
    finally:
        handle.remove()


def check(model: Any, ids: torch.Tensor = ONE_ROW) -> torch.Tensor:
    base = model.get_base_model()
    assert base.decoding_path() == "native step"
    found = scores(model, ids)
    with torch.no_grad():
        out = base(ids, output_hidden_states=True)
    # An adapter adds two smaller products to each product.
    bound = 2 * rounding(base.spec, out)
    torch.testing.assert_close(found, by_modules(model, lambda: scores(model, ids)), rtol=0, atol=bound)
    return found


@pytest.mark.parametrize("family", CAUSAL)
def test_adapters_on_every_matrix(monoblock_library: Library, family: str) -> None:
    model = adapted(monoblock_library, family)
    one = check(model)
    check(model, ONE_ROW.expand(3, -1) + torch.arange(3)[:, None])
    with model.disable_adapter():
        plain = check(model)
    assert (one - plain).abs().max() > 0.1


def test_changes_of_adapters_change_the_native_step(monoblock_library: Library) -> None:
    model = adapted(monoblock_library, "mistral")
    seen = [check(model)]
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    seen.append(check(model))
    model.add_adapter("other", config("mistral"))
    seen.append(check(model))
    assert torch.equal(seen[1], seen[2])  # added but not active
    model.set_adapter("other")
    filled(model, 2)
    seen.append(check(model))
    model.base_model.set_adapter(["default", "other"])
    seen.append(check(model))
    filled(model, 3)
    seen.append(check(model))
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-2 for other in seen[i + 1 :] if not torch.equal(one, other))
    assert len({float(one.sum()) for one in seen}) == 5
    merged = model.merge_and_unload()
    assert merged.decoding_path() == "native step"
    # W + B A is rounded once more.
    torch.testing.assert_close(scores(merged), seen[-1], rtol=0, atol=1e-4)


def test_models_converted_to_another_dtype_use_the_native_step(monoblock_library: Library) -> None:
    """The base matrices below adapters are fused again."""
    model = adapted(monoblock_library, "mistral").double().float()
    check(model)


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_float32_adapters_of_a_bfloat16_model(monoblock_library: Library, family: str) -> None:
    """peft keeps adapters in float32. Between bfloat16 matrices the native step computes in float32; its error against
    the float32 model is no larger than that of the modules."""
    exact = adapted(monoblock_library, family)
    for name, parameter in exact.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    half = adapted(monoblock_library, family, dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.float32}
    assert half.get_base_model().decoding_path() == "native step"
    # For the first new token only: later tokens may diverge.
    want, found = scores(exact)[1], scores(half)[1]
    modules = by_modules(half, lambda: scores(half)[1])
    assert (found - want).abs().max() <= 1.5 * (modules - want).abs().max()


def test_merging_into_quantised_weights_is_refused(monoblock_library: Library, folders: Any) -> None:
    name = LANGUAGE["mistral"]
    model = getattr(monoblock_library, name).from_pretrained(folders(name), quantization_config="int8")
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=RANK)).eval()
    filled(model, 1)
    with pytest.raises(RuntimeError, match=r"quantised.*dequantize"):
        model.merge_and_unload()
    model.get_base_model().dequantize()
    before = scores(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(scores(merged), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["int8", "int4", "lossless"])
def test_adapters_on_quantised_weights(monoblock_library: Library, folders: Any, how: str) -> None:
    name = LANGUAGE["mistral"]
    model = getattr(monoblock_library, name).from_pretrained(
        folders(name), quantization_config=how, dtype=torch.bfloat16 if how == "lossless" else torch.float32
    )
    model = get_peft_model(model, config("mistral")).eval()
    filled(model, 1)
    assert model.get_base_model().decoding_path() == "native step"
    with model.disable_adapter():
        plain, plain_modules = scores(model), by_modules(model, lambda: scores(model))
    found, modules = scores(model), by_modules(model, lambda: scores(model))
    assert (found - plain).abs().max() > 0.1
    # Both paths quantise the inputs of the product; an adapter adds float32 sums only.
    noise = float((plain - plain_modules).abs().max())
    torch.testing.assert_close(found, modules, rtol=0, atol=max(4 * noise, 1e-4))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "in model.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_unsupported_adapters_are_named(
    monoblock_library: Library, options: dict[str, Any], why: str
) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(monoblock_library.model(LANGUAGE["mistral"]), LoraConfig(**options)).eval()
    filled(model, 1)
    path = model.get_base_model().decoding_path()
    assert path != "native step"
    assert why in path
    assert torch.equal(scores(model), by_modules(model, lambda: scores(model)))
