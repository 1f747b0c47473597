"""The decoding path is reported: by `decoding_path()`, and in the log once per reason."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from monoblock import (
    MistralConfig,
    MistralForCausalLM,
    MPNetConfig,
    MPNetForMaskedLM,
    native,
)
from monoblock.backends.pytorch.generation import cuda_graphs

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
IDS = torch.arange(6)[None]
CALL: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model() -> Any:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return MistralForCausalLM(config).eval()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


def test_a_plain_model_uses_the_native_step(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "monoblock")
    assert model.decoding_path() == "native step"
    model.generate(IDS, **CALL)
    model.generate(IDS, **CALL)
    assert logged(caplog) == ["MistralForCausalLM: decoding by the native step"]


def test_hooks_are_named_and_logged_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "monoblock")
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert model.decoding_path() == "a forward hook on model.layers.1"
    model.generate(IDS, **CALL)
    model.generate(IDS, **CALL)
    reason = "MistralForCausalLM: decoding module by module, because of: a forward hook on model.layers.1"
    assert logged(caplog) == [reason]
    handle.remove()
    assert model.decoding_path() == "native step"
    model.generate(IDS, **CALL)
    assert logged(caplog) == [reason, "MistralForCausalLM: decoding by the native step"]


def test_reasons_of_a_call_are_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "monoblock")
    model.generate(IDS, **CALL, use_cache=False)
    model.generate(IDS, **CALL, cache_implementation="quantized")
    model.generate(IDS, **CALL, return_dict_in_generate=True, output_attentions=True)
    model.generate(IDS.expand(17, -1), **CALL)
    assert [line.partition("because of: ")[2] for line in logged(caplog)] == [
        "use_cache=False",
        "a cache of the class QuantizedCache",
        "output_attentions=True",
        "",  # the model is fit for it, and the batch of 17 is not
        "a cache or a batch that the native step does not take",
    ]


def adapter(package: str, of: Any) -> nn.Module:
    """A wrapper as adapters make them, of a class in that package."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = of

        def forward(self, x: Any) -> Any:
            return self.base_layer(x)

    Linear.__module__ = package
    Linear.__qualname__ = "Linear"
    return Linear()


@pytest.mark.parametrize(
    "package, reason",
    [
        ("peft.tuners.lora.layer", "LoRA adapter (peft) in model.layers.0.self_attn.q_proj"),
        ("peft.tuners.ia3.layer", "ia3 adapter (peft) in model.layers.0.self_attn.q_proj"),
        ("other.layers", "module of the class other.layers.Linear in model.layers.0.self_attn.q_proj"),
    ],
)
def test_modules_of_other_packages(model: Any, package: str, reason: str) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = adapter(package, attention.q_proj)
    assert model.decoding_path() == reason


def test_peft_adapter(model: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], r=2))
    assert wrapped.decoding_path() == "LoRA adapter (peft) in model.layers.0.self_attn.v_proj"


def test_dtypes_and_settings(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.double().decoding_path() == "dtype float64"
    model.float().set_attn_implementation("eager")
    assert model.decoding_path() == "attn_implementation='eager'"
    model.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decoding_path() == "autocast"
    assert model.to("meta").decoding_path() == "device meta"


def test_models_without_a_language_model_head() -> None:
    config = MPNetConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    assert MPNetForMaskedLM(config).decoding_path() == "MPNetForMaskedLM predicts no next token"


def test_cuda_graphs(model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where the device captures graphs; here the CPU, whose graph is the step itself."""
    caplog.set_level(logging.INFO, "monoblock")
    monkeypatch.setitem(cuda_graphs.CAPTURE, "cpu", lambda run, _: run)
    assert model.decoding_path() == "CUDA graph"
    model.generate(IDS, **{**CALL, "max_new_tokens": 20})
    model.generate(IDS, **CALL)
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert model.decoding_path() == "a forward hook on model.norm"
    model.generate(IDS, **{**CALL, "max_new_tokens": 20})
    handle.remove()
    assert [line.removeprefix("MistralForCausalLM: decoding ") for line in logged(caplog)] == [
        "by the CUDA graph",
        "module by module, because of: fewer than 16 new tokens",
        "module by module, because of: a forward hook on model.norm",
    ]
    monkeypatch.setitem(sys.modules, "elsewhere", types.ModuleType("elsewhere"))
    model.lm_head = adapter("elsewhere", model.lm_head)
    assert model.decoding_path() == "module of the class elsewhere.Linear in lm_head"
