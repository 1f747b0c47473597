"""Config fields of other libraries: implemented, refused by name, or kept without a warning. None that changes the
results is ignored as unknown."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from monoblock import AutoConfig
from monoblock.config import PretrainedConfig
from monoblock.config_fields import HARMLESS, QUIET, REFUSED
from monoblock.errors import UnsupportedConfig
from monoblock.families import FAMILIES, ModelClass, family, named_classes, warn_of_another_class

# Fields of published configs that transformers' classes do not have, by family and model.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "mpt": {
        "mosaicml/mpt-7b": {
            "attn_config": {"attn_impl": "torch", "attn_pdrop": 0, "prefix_lm": False, "softmax_scale": None},
            "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
            "embedding_fraction": 1.0,
            "init_config": {"name": "kaiming_normal_", "init_gain": 0, "verbose": 0},
            "init_device": "cpu",
            "tokenizer_name": "EleutherAI/gpt-neox-20b",
            "torch_dtype": "bfloat16",
            "verbose": 0,
        },
    },
    "mistral": {
        "mistralai/Mistral-7B-v0.1": {
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        },
        "unsloth/mistral-7b": {"unsloth_version": "2024.9", "unsloth_fixed": True, "pretraining_tp": 1},
        "a llama-like finetune": {
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": None,
            "output_router_logits": False,
            "_attn_implementation_autoset": True,
            "neftune_noise_alpha": 5,
            "model_max_length": 32768,
        },
        "NousResearch/Yarn-Mistral-7b-128k": {
            "max_sequence_length": 131072,
            "rope_scaling": {
                "factor": 16.0,
                "finetuned": True,
                "original_max_position_embeddings": 8192,
                "type": "yarn",
            },
        },
    },
    "openai-gpt": {
        "openai-community/openai-gpt": {
            "n_ctx": 512,
            "n_special": 0,
            "predict_special_tokens": True,
            "architectures": ["OpenAIGPTLMHeadModel"],
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
    },
    "gpt_neo": {
        "EleutherAI/gpt-neo-1.3B": {
            "attention_layers": ["global", "local"] * 12,
            "transformers_version": "4.9.0.dev0",
            "gradient_checkpointing": False,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "tokenizer_class": "GPT2Tokenizer",
        },
    },
    "mpnet": {
        "microsoft/mpnet-base": {
            "gradient_checkpointing": False,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 514,
        },
        "a cross-encoder": {
            "position_embedding_type": "absolute",
            "type_vocab_size": 2,
            "use_cache": True,
            "sentence_transformers": {
                "activation_fn": "torch.nn.modules.linear.Identity",
                "version": "5.0.0",
            },
            "transformers.js_config": {"dtype": "q8"},
        },
    },
    "fuyu": {"adept/fuyu-8b": {"_name_or_path": "fuyu-8b", "torch_dtype": "bfloat16"}},
}
CASES = [(model, name) for model, cases in PUBLISHED.items() for name in cases]


def config(model_type: str, **fields: Any) -> PretrainedConfig:
    return family(model_type).config(**fields)


@pytest.mark.parametrize(("model_type", "name"), CASES, ids=str)
def test_published_configs_load_without_a_warning(
    model_type: str, name: str, logs: pytest.LogCaptureFixture
) -> None:
    given = PUBLISHED[model_type][name]
    made = config(model_type, **given)
    assert made.to_spec().layers > 0
    assert logs.messages == []
    written = made.to_dict()
    # Written unchanged, except for fields with another name or structure here.
    same = given.keys() - {"rope_scaling", "torch_dtype", "attn_config"}
    assert {name: written.get(name) for name in same} == {name: given[name] for name in same}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_that_change_the_results_are_refused(model_type: str) -> None:
    rules = family(model_type).config.refused()
    assert {"is_causal", "mlp_bias", "num_local_experts", "layer_types"} - rules.keys() <= {"layer_types"}
    for field, (allowed, _) in rules.items():
        for value in (*allowed, None):
            assert getattr(config(model_type, **{field: value}), field) == value
        other = "something else" if field not in ("chunk_size_feed_forward",) else 7
        if field in ("is_encoder_decoder", "add_cross_attention", "torchscript", "is_decoder"):
            other = True
        with pytest.raises(UnsupportedConfig, match=rf"\.{field}=.* is not supported"):
            config(model_type, **{field: other})


def test_the_field_tables_are_consistent() -> None:
    assert not QUIET & REFUSED.keys()
    names = [name for group in HARMLESS.values() for name in group.split()]
    assert len(names) == len(set(names)), "a field is in one group"
    for model_type in FAMILIES:
        own = family(model_type).config
        assert not own.implied.keys() & own.fields.keys(), f"{model_type} declares what it refuses"


def test_unknown_fields_are_kept_and_warned_about_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainedConfig, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="monoblock"):
        made = [config("mistral", my_own_field=3) for _ in range(2)]
    assert [message for message in caplog.messages if "my_own_field" in message] == caplog.messages
    assert len(caplog.messages) == 1
    assert made[0].to_dict()["my_own_field"] == 3


def test_use_sliding_window() -> None:
    """Qwen's field: False is accepted without a window only."""
    config("mistral", use_sliding_window=False, sliding_window=None).to_spec()
    config("mistral", use_sliding_window=True, sliding_window=7).to_spec()
    with pytest.raises(UnsupportedConfig, match="contradicts sliding_window=7"):
        config("mistral", use_sliding_window=False, sliding_window=7).to_spec()


def test_unsupported_rope_keys_are_refused() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    for key, value in {"llama_4_scaling_beta": 0.1, "mrope_section": [2, 3], "short_factor": [1.0]}.items():
        with pytest.raises(UnsupportedConfig, match=rf"rope_parameters\.{key} is not supported"):
            config("mistral", rope_parameters={**rope, key: value})
        config("mistral", rope_parameters={**rope, key: None})


def test_fields_of_nested_configs_are_checked(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedConfig, match="use_parallel_residual"):
        config("fuyu", text_config={"model_type": "persimmon", "use_parallel_residual": True})
    with caplog.at_level(logging.WARNING, logger="monoblock"):
        config("fuyu", text_config={"model_type": "persimmon", "hidden_size": 64, "a_new_field": 1})
    assert [message for message in caplog.messages if "a_new_field" in message] == caplog.messages != []


def test_ministral_is_read_as_mistral(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ministral"}))
    assert type(AutoConfig.from_pretrained(tmp_path)) is family("mistral").config
    with pytest.raises(ValueError, match="no family 'ministral3'"):
        AutoConfig.for_model("ministral3")


@pytest.mark.parametrize(
    ("architectures", "found"),
    [
        (["MistralForCausalLM"], "MistralForCausalLM"),
        (["MinistralForCausalLM"], "MistralForCausalLM"),
        (["mistralmodel"], "MistralModel"),
        (["MistralBiModel"], None),
        (None, None),
    ],
)
def test_classes_named_in_architectures(architectures: list[str] | None, found: str | None) -> None:
    rows = named_classes(config("mistral", architectures=architectures))
    assert [row.name for row in rows] == ([] if found is None else [found])


def test_a_custom_class_in_architectures_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    row: ModelClass = family("mistral").model_class("MistralModel")
    with caplog.at_level(logging.WARNING, logger="monoblock"):
        for name in ("MistralModel", "TFMistralModel", "FlaxMistralModel", "MinistralModel", None):
            warn_of_another_class(config("mistral", architectures=name and [name]), row)
        assert caplog.messages == []
        for _ in range(2):
            warn_of_another_class(config("mistral", architectures=["MistralBiModel"]), row)
    assert len(caplog.messages) == 1
    assert "names the class 'MistralBiModel', which is none of monoblock's" in caplog.messages[0]
