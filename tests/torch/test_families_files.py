"""Checkpoints and configs of Mistral, Fuyu, GPT-1, GPT Neo and MPNet: round trips through transformers, every naming
scheme of published files, and the documented signatures and defaults."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import randomised
from measure import assert_close
from safetensors.torch import load_file, save_file
from tiny_families import CLASSES, KIND, fields, logits_of, model_inputs, monoblock_model, pair, theirs_inputs

import monoblock
from monoblock.backends.pytorch.ops import ACT
from monoblock.errors import MissingKeys, ShapeMismatch, UnexpectedKeys, UnreadKeys
from monoblock.families import family_of

ATOL = 2e-5  # fp32 through the fused kernels
State = dict[str, torch.Tensor]


def written(name: str, folder: Path, change: Callable[[State], State] | None = None, **more: Any) -> Any:
    """Saves a random model of that class in the folder, applies `change` to the file's tensors; returns the model."""
    model = monoblock_model(name, **fields(CLASSES[name], **more))
    model.save_pretrained(folder)
    if change is not None:
        file = folder / "model.safetensors"
        save_file({k: v.clone().contiguous() for k, v in change(load_file(file)).items()}, file)
    return model


def same_weights(a: Any, b: Any) -> None:
    ours, others = a.hub_state_dict(), b.hub_state_dict()
    assert ours.keys() == others.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, others[key]), key


# ---------------------------------------------------------------------------- round trips through transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_round_trip_with_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, _ = pair(name)
    copy.deepcopy(theirs).to(dtype).save_pretrained(tmp_path / "theirs")
    ours = getattr(monoblock, name).from_pretrained(tmp_path / "theirs")
    assert ours.dtype == dtype
    ours.save_pretrained(tmp_path / "ours")
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert again.dtype == dtype
    first = getattr(transformers, name).from_pretrained(tmp_path / "theirs").state_dict()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, first[key]), key
    ids, mask = model_inputs(name, "right")
    if dtype == torch.float32:
        there, found = again.eval()(**theirs_inputs(name, ids, mask)), ours(ids, attention_mask=mask)
        at = mask if KIND[name] not in ("sequence", "first", "choice") else None
        assert_close(f"{name} after two files", logits_of(found), logits_of(there), ATOL, at)


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip_through_transformers(name: str, tmp_path: Path) -> None:
    labels = 2 if name == "MPNetForQuestionAnswering" else 4
    ours = written(name, tmp_path / "ours", num_labels=labels)
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    theirs.save_pretrained(tmp_path / "theirs")
    again = getattr(monoblock, name).from_pretrained(tmp_path / "theirs")
    same_weights(ours, again)
    assert again.config.to_spec() == ours.config.to_spec()
    state = theirs.state_dict()
    for key, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
        assert torch.equal(state[key], tensor), key
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [name]
    assert config["model_type"] == CLASSES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_auto_classes(name: str, tmp_path: Path) -> None:
    autos = {
        "Model": "AutoModel",
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForMultipleChoice": "AutoModelForMultipleChoice",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForTokenClassification": "AutoModelForTokenClassification",
        "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    }
    auto = next((autos[end] for end in sorted(autos, key=len, reverse=True) if name.endswith(end)), "")
    if KIND[name] == "double":
        pytest.skip("no Auto class for the double heads, nor in transformers")
    made = written(name, tmp_path)
    found = getattr(monoblock, auto).from_pretrained(tmp_path)
    assert type(found) is type(made)
    same_weights(found, made)
    if name == "FuyuForCausalLM":
        assert type(monoblock.AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(made)


# ---------------------------------------------------------------------------- naming schemes of published files


def fuyu_old(state: State) -> State:
    """The names in adept/fuyu-8b."""

    def renamed_key(key: str) -> str:
        key = key.replace("model.language_model.", "language_model.model.")
        key = key.replace("model.vision_embed_tokens.", "vision_embed_tokens.")
        return key.replace("lm_head.weight", "language_model.lm_head.weight")

    old = {renamed_key(key): tensor for key, tensor in state.items()}
    return old | {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}


def neo_buffers(state: State) -> State:
    """The buffers in EleutherAI/gpt-neo-*: causal masks and their fill values."""
    masks = {f"transformer.h.{i}.attn.attention.bias": torch.ones(1, 1, 4, 4) for i in range(3)}
    fill_values = {f"transformer.h.{i}.attn.attention.masked_bias": torch.tensor(-1e9) for i in range(3)}
    return state | masks | fill_values


def renamed(**names: str) -> Callable[[State], State]:
    def change(state: State) -> State:
        for old, new in names.items():
            state[new.replace("__", ".")] = state.pop(old.replace("__", "."))
        return state

    return change


def without_prefix(prefix: str) -> Callable[[State], State]:
    return lambda state: {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def more(**tensors: Callable[[State], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: state | {key.replace("__", "."): made(state) for key, made in tensors.items()}


EMBED = "transformer__tokens_embed__weight"
SCHEMES: dict[str, tuple[str, Callable[[State], State]]] = {
    "old Fuyu": ("FuyuForCausalLM", fuyu_old),
    "GPT Neo's buffers": ("GPTNeoForCausalLM", neo_buffers),
    "GPT Neo's buffers in the bare model": (
        "GPTNeoModel",
        lambda state: without_prefix("transformer.")(neo_buffers(state)),
    ),
    "a copy of GPT Neo's tied head": (
        "GPTNeoForCausalLM",
        more(lm_head__weight=lambda state: state["transformer.wte.weight"]),
    ),
    "GPT-1's tied matrix under the head's name only": (
        "OpenAIGPTLMHeadModel",
        renamed(**{EMBED: "lm_head__weight"}),
    ),
    "GPT-1's double heads, tied matrix under the head's name only": (
        "OpenAIGPTDoubleHeadsModel",
        renamed(**{EMBED: "lm_head__weight"}),
    ),
    "GPT-1 under both names": (
        "OpenAIGPTLMHeadModel",
        more(lm_head__weight=lambda state: state["transformer.tokens_embed.weight"]),
    ),
    "GPT-1's buffers": (
        "OpenAIGPTLMHeadModel",
        more(
            transformer__h__0__attn__bias=lambda _: torch.ones(1, 1, 4, 4),
            transformer__position_ids=lambda _: torch.arange(64),
        ),
    ),
    "GPT-1 without the prefix": (
        "OpenAIGPTLMHeadModel",
        without_prefix("transformer."),
    ),
    "MPNet's head bias under its other name": (
        "MPNetForMaskedLM",
        renamed(lm_head__bias="lm_head__decoder__bias"),
    ),
    "MPNet's head bias under both names": (
        "MPNetForMaskedLM",
        more(lm_head__decoder__bias=lambda state: state["lm_head.bias"]),
    ),
    "MPNet's tied matrix and position ids": (
        "MPNetForMaskedLM",
        more(
            lm_head__decoder__weight=lambda state: state["mpnet.embeddings.word_embeddings.weight"],
            mpnet__embeddings__position_ids=lambda _: torch.arange(66)[None],
        ),
    ),
    "Mistral's frequencies": (
        "MistralForCausalLM",
        more(model__layers__0__self_attn__rotary_emb__inv_freq=lambda _: torch.ones(5)),
    ),
    "Mistral without the prefix": ("MistralForCausalLM", without_prefix("model.")),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_naming_schemes(case: str, tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    name, change = SCHEMES[case]
    made = written(name, tmp_path, change)
    found = getattr(monoblock, name).from_pretrained(tmp_path)
    same_weights(found, made)
    assert not [record for record in logs.records if record.levelno >= logging.WARNING]
    state = (
        torch.load(tmp_path / "w.bin")
        if (tmp_path / "w.bin").exists()
        else load_file(tmp_path / "model.safetensors")
    )
    fresh = monoblock_model(name, **fields(CLASSES[name]))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(state)
    same_weights(fresh, made)


@pytest.mark.parametrize(
    "case",
    ["old Fuyu", "GPT-1's tied matrix under the head's name only", "MPNet's head bias under both names"],
)
def test_naming_schemes_in_pickled_files(case: str, tmp_path: Path) -> None:
    name, change = SCHEMES[case]
    made = written(name, tmp_path, change)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    same_weights(getattr(monoblock, name).from_pretrained(tmp_path), made)


def test_gpt_1_as_transformers_5_saves_its_double_heads(tmp_path: Path) -> None:
    """With the tied matrix under the head's name only; in transformers, the bare model gets a random embedding."""
    theirs, _ = pair("OpenAIGPTDoubleHeadsModel")
    theirs.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    expected = theirs.transformer.tokens_embed.weight
    for name in ("OpenAIGPTModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel"):
        found = getattr(monoblock, name).from_pretrained(tmp_path)
        assert torch.equal(found.get_input_embeddings().weight, expected), name
    found.save_pretrained(tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert "transformer.tokens_embed.weight" in ours
    assert "lm_head.weight" not in ours
    assert ("lm_head.weight" in keys) != ("transformer.tokens_embed.weight" in keys)


HEADED = [n for n in CLASSES if KIND[n] not in (None, "pooler")]


@pytest.mark.parametrize("name", [n for n in HEADED if CLASSES[n] != "fuyu"])
def test_headed_models_from_bare_files_and_back(
    name: str, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    bare = next(n for n in CLASSES if CLASSES[n] == CLASSES[name] and KIND[n] in (None, "pooler"))
    made = written(bare, tmp_path / "bare")
    headed = getattr(monoblock, name).from_pretrained(tmp_path / "bare")
    same_backbone(made, headed)
    # Missing tensors are initialised with a warning: an untied head, but not a pooler that the file has.
    own = {k for k in headed.shapes() if k.startswith("head.")}
    warnings = [r.getMessage() for r in logs.records if "newly initialised" in r.getMessage()]
    if KIND[name] == "choice":
        own -= {"head.dense.weight", "head.dense.bias"}
    assert bool(warnings) == bool(own), warnings
    headed.save_pretrained(tmp_path / "headed")
    logs.clear()
    same_backbone(getattr(monoblock, bare).from_pretrained(tmp_path / "headed"), headed)


def same_backbone(a: Any, b: Any) -> None:
    one, other = a.bare.state_dict(), b.bare.state_dict()
    assert {k for k in one if "pooler" not in k} == {k for k in other if "pooler" not in k}
    for key in one.keys() & other.keys():
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", [n for n in CLASSES if KIND[n] == "causal"])
def test_untied_heads(name: str, tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    made = written(name, tmp_path / "one", tie_word_embeddings=False)
    assert "lm_head.weight" in load_file(tmp_path / "one" / "model.safetensors")
    found = getattr(monoblock, name).from_pretrained(tmp_path / "one")
    same_weights(found, made)
    assert not torch.equal(found.at("head_out").weight, found.get_input_embeddings().weight)
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "one")
    assert torch.equal(theirs.lm_head.weight, made.at("head_out").weight)
    logs.clear()
    made = written(
        name,
        tmp_path / "two",
        lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"},
        tie_word_embeddings=False,
    )
    found = getattr(monoblock, name).from_pretrained(tmp_path / "two")
    same_backbone(found, made)
    (warning,) = [r.getMessage() for r in logs.records if r.levelno == logging.WARNING]
    assert "newly initialised" in warning
    assert "lm_head.weight" in warning


WRONG: dict[str, tuple[type[Exception], str, Callable[[State], State], str]] = {
    "Mistral's misspelt": (
        MissingKeys,
        "MistralForCausalLM",
        renamed(model__layers__1__self_attn__o_proj__weight="model__layers__1__self_attn__out_proj__weight"),
        r"lacks model\.layers\.1\.self_attn\.o_proj\.weight; the nearest name in it is "
        r"model\.layers\.1\.self_attn\.out_proj\.weight",
    ),
    "one of three": (
        MissingKeys,
        "GPTNeoModel",
        renamed(h__0__attn__attention__k_proj__weight="h__0__attn__attention__key__weight"),
        r"lacks h\.0\.attn\.attention\.q_proj\.weight",
    ),
    "Fuyu's unknown": (
        UnexpectedKeys,
        "FuyuForCausalLM",
        more(model__vision_embed_token__weight=lambda state: state["lm_head.weight"]),
        r"holds model\.vision_embed_token\.weight, which is no parameter of this family; the nearest is "
        r"model\.vision_embed_tokens\.weight",
    ),
    "GPT-1's layer too many": (
        UnreadKeys,
        "OpenAIGPTModel",
        more(h__3__ln_1__weight=lambda state: state["h.2.ln_1.weight"]),
        r"holds h\.3\.ln_1\.weight, which the config does not allow for",
    ),
    "MPNet's shape": (
        ShapeMismatch,
        "MPNetForMaskedLM",
        lambda state: state | {"mpnet.encoder.relative_attention_bias.weight": torch.zeros(16, 6)},
        r"mpnet\.encoder\.relative_attention_bias\.weight \(rel_bias\.weight\) is \[16, 6\] in model\.safetensors, but "
        r"the config implies \[32, 6\]",
    ),
    "MPNet without a layer": (
        MissingKeys,
        "MPNetModel",
        lambda state: {k: v for k, v in state.items() if not k.startswith("encoder.layer.2")},
        r"lacks encoder\.layer\.2\.attention\.attn\.q\.weight|lacks encoder\.layer\.2\.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_raise_with_the_nearest(case: str, tmp_path: Path) -> None:
    error, name, change, message = WRONG[case]
    written(name, tmp_path, change)
    with pytest.raises(error, match=message):
        getattr(monoblock, name).from_pretrained(tmp_path)


# ---------------------------------------------------------------------------- config files of several versions

ROPE = {"rope_theta": 300.0, "rope_type": "linear", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}
TEXT = {
    "model_type": "persimmon",
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "hidden_act": "relu2",
    "vocab_size": 89,
    "max_position_embeddings": 64,
}
FLAT_FUYU = {k: v for k, v in TEXT.items() if k != "model_type"}
SMALL = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "vocab_size": 89}
MISTRAL = {**SMALL, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
NEO = {"hidden_size": 36, "num_heads": 6, "vocab_size": 89, "max_position_embeddings": 64, "window_size": 5}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral of 2023": (
        "MistralForCausalLM",
        {
            **MISTRAL,
            "rope_theta": 300.0,
            "sliding_window": 5,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
        },
    ),
    "Mistral v0.3": (
        "MistralForCausalLM",
        {**MISTRAL, "rope_theta": 1e6, "sliding_window": None, "attention_dropout": 0.0},
    ),
    "Mistral Nemo": (
        "MistralForCausalLM",
        {**MISTRAL, "head_dim": 10, "rope_theta": 1e6, "sliding_window": None},
    ),
    "Mistral, flat scaling": ("MistralForCausalLM", {**MISTRAL, "rope_theta": 300.0, "rope_scaling": YARN}),
    "Mistral, flat scaling, rope_type": (
        "MistralForCausalLM",
        {
            **MISTRAL,
            "rope_theta": 300.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 12,
        },
    ),
    "Mistral, rope_parameters": ("MistralForCausalLM", {**MISTRAL, "rope_parameters": ROPE}),
    "Mistral, default rope_parameters": (
        "MistralForCausalLM",
        {**MISTRAL, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    ),
    "Fuyu, flat": (
        "FuyuForCausalLM",
        {
            **FLAT_FUYU,
            "patch_size": 4,
            "rope_theta": 300.0,
            "rope_scaling": None,
            "image_size": 20,
            "qk_layernorm": True,
        },
    ),
    "Fuyu, flat, scaled": (
        "FuyuForCausalLM",
        {
            **FLAT_FUYU,
            "patch_size": 4,
            "rope_theta": 300.0,
            "rope_scaling": {"type": "linear", "factor": 3.0},
        },
    ),
    "Fuyu, flat, partial_rotary_factor": (
        "FuyuForCausalLM",
        {**FLAT_FUYU, "patch_size": 4, "partial_rotary_factor": 0.25},
    ),
    "Fuyu, flat, partial_rotary_factor, scaled": (
        "FuyuForCausalLM",
        {**FLAT_FUYU, "patch_size": 4, "partial_rotary_factor": 1.0, "rope_scaling": YARN},
    ),
    "Fuyu, nested": (
        "FuyuForCausalLM",
        {
            "patch_size": 4,
            "image_token_id": 7,
            "text_config": {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
        },
    ),
    "Fuyu, nested, without norms": (
        "FuyuForCausalLM",
        {"patch_size": 4, "text_config": {**TEXT, "qk_layernorm": False, "rope_theta": 300.0}},
    ),
    "GPT Neo, types": (
        "GPTNeoForCausalLM",
        {**NEO, "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    ),
    "GPT Neo, types and layers": (
        "GPTNeoForCausalLM",
        {
            **NEO,
            "num_layers": 3,
            "attention_types": [[["local"], 1], [["global"], 2]],
            "attention_layers": ["local", "global", "global"],
            "gradient_checkpointing": False,
        },
    ),
    "GPT-1": (
        "OpenAIGPTLMHeadModel",
        {
            "n_embd": 36,
            "n_layer": 2,
            "n_head": 6,
            "n_positions": 64,
            "n_ctx": 64,
            "n_special": 0,
            "vocab_size": 89,
            "afn": "gelu",
            "predict_special_tokens": True,
        },
    ),
    "MPNet": (
        "MPNetForMaskedLM",
        {
            **SMALL,
            "num_attention_heads": 6,
            "max_position_embeddings": 66,
            "layer_norm_eps": 1e-5,
            "type_vocab_size": 1,
            "gradient_checkpointing": False,
        },
    ),
}


@pytest.mark.parametrize("case", FILES)
@torch.no_grad()
def test_config_files_of_several_versions(case: str, tmp_path: Path) -> None:
    """Loaded, saved, and loaded in transformers: the same config and the same logits."""
    name, data = FILES[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": CLASSES[name], **data}))
    config = monoblock.AutoConfig.from_pretrained(tmp_path)
    there = transformers.AutoConfig.from_pretrained(tmp_path)
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "head_dim",
        "sliding_window",
    ):
        if key in data:
            text = there.get_text_config()
            assert getattr(config, key) == getattr(text, key) == data[key]
    model = randomised(getattr(monoblock, name)(config)).float().eval()
    model.save_pretrained(tmp_path / "ours")
    again = getattr(monoblock, name).from_pretrained(tmp_path / "ours")
    assert again.spec == model.spec
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(10, 89, (2, 23), generator=torch.Generator().manual_seed(0))
    assert_close(f"config file, {case}", again(ids).logits, theirs(ids).logits, ATOL)
    # transformers' file of the same model gives the same spec.
    theirs.save_pretrained(tmp_path / "theirs")
    assert getattr(monoblock, name).from_pretrained(tmp_path / "theirs").spec == model.spec


# ---------------------------------------------------------------------------- documentation

# Fields and defaults in the order of the documentation.
CONFIGS: dict[str, dict[str, Any]] = {
    "MistralConfig": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "attention_dropout": 0.0,
    },
    "FuyuConfig": {
        "vocab_size": 262144,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "hidden_act": "relu2",
        "max_position_embeddings": 16384,
        "image_size": 300,
        "patch_size": 30,
        "num_channels": 3,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "use_cache": True,
        "tie_word_embeddings": False,
        "rope_theta": 25000.0,
        "rope_scaling": None,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "text_config": None,
    },
    "OpenAIGPTConfig": {
        "vocab_size": 40478,
        "n_positions": 512,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "afn": "gelu",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "summary_activation": None,
        "summary_proj_to_labels": True,
        "summary_first_dropout": 0.1,
    },
    "GPTNeoConfig": {
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "attention_types": [[["global", "local"], 12]],
        "num_heads": 16,
        "intermediate_size": None,
        "window_size": 256,
        "activation_function": "gelu_new",
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.1,
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "MPNetConfig": {
        "vocab_size": 30527,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "relative_attention_num_buckets": 32,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}

_MISTRAL = "input_ids attention_mask position_ids past_key_values inputs_embeds"
_GPT1 = "input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds"
_NEO = "input_ids past_key_values attention_mask token_type_ids position_ids head_mask inputs_embeds"
_MPNET = "input_ids attention_mask position_ids head_mask inputs_embeds"
_SPAN = "start_positions end_positions"
_OLD = "output_attentions output_hidden_states return_dict"
_NEW = "output_attentions output_hidden_states"

# Class -> (arguments of forward in order, output class), as documented.
FORWARDS: dict[str, tuple[str, str]] = {
    "MistralModel": (f"{_MISTRAL} use_cache {_NEW} cache_position", "BaseModelOutputWithPast"),
    "MistralForCausalLM": (
        f"{_MISTRAL} labels use_cache {_NEW} cache_position logits_to_keep",
        "CausalLMOutputWithPast",
    ),
    "MistralForSequenceClassification": (
        f"{_MISTRAL} labels use_cache {_NEW}",
        "SequenceClassifierOutputWithPast",
    ),
    "MistralForTokenClassification": (f"{_MISTRAL} labels use_cache {_NEW}", "TokenClassifierOutput"),
    "MistralForQuestionAnswering": (f"{_MISTRAL} {_SPAN} {_NEW}", "QuestionAnsweringModelOutput"),
    "FuyuForCausalLM": (
        "input_ids image_patches image_patches_indices attention_mask position_ids past_key_values inputs_embeds "
        f"use_cache labels {_OLD}",
        "CausalLMOutputWithPast",
    ),
    "OpenAIGPTModel": (f"{_GPT1} {_OLD}", "BaseModelOutput"),
    "OpenAIGPTLMHeadModel": (f"{_GPT1} labels {_OLD}", "CausalLMOutput"),
    "OpenAIGPTDoubleHeadsModel": (
        f"{_GPT1} mc_token_ids labels mc_labels {_OLD}",
        "OpenAIGPTDoubleHeadsModelOutput",
    ),
    "OpenAIGPTForSequenceClassification": (f"{_GPT1} labels {_OLD}", "SequenceClassifierOutput"),
    "GPTNeoModel": (f"{_NEO} use_cache {_OLD}", "BaseModelOutputWithPastAndCrossAttentions"),
    "GPTNeoForCausalLM": (f"{_NEO} labels use_cache {_OLD}", "CausalLMOutputWithCrossAttentions"),
    "GPTNeoForQuestionAnswering": (
        f"input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds {_SPAN} {_OLD}",
        "QuestionAnsweringModelOutput",
    ),
    "GPTNeoForSequenceClassification": (
        f"{_NEO} labels use_cache {_OLD}",
        "SequenceClassifierOutputWithPast",
    ),
    "GPTNeoForTokenClassification": (f"{_NEO} labels use_cache {_OLD}", "TokenClassifierOutput"),
    "MPNetModel": (f"{_MPNET} {_OLD}", "BaseModelOutputWithPooling"),
    "MPNetForMaskedLM": (f"{_MPNET} labels {_OLD}", "MaskedLMOutput"),
    "MPNetForSequenceClassification": (f"{_MPNET} labels {_OLD}", "SequenceClassifierOutput"),
    "MPNetForMultipleChoice": (f"{_MPNET} labels {_OLD}", "MultipleChoiceModelOutput"),
    "MPNetForTokenClassification": (f"{_MPNET} labels {_OLD}", "TokenClassifierOutput"),
    "MPNetForQuestionAnswering": (f"{_MPNET} {_SPAN} {_OLD}", "QuestionAnsweringModelOutput"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_documented_configs(name: str) -> None:
    kind, documented = getattr(monoblock, name), CONFIGS[name]
    parameters = inspect.signature(kind).parameters
    assert list(parameters)[: len(documented)] == list(documented)
    assert {field: parameters[field].default for field in documented} == documented
    assert next(reversed(parameters.values())).kind is inspect.Parameter.VAR_KEYWORD
    made = kind()
    assert {field: getattr(made, field) for field in documented} == documented
    there = getattr(transformers, name)()
    for field, default in documented.items():
        if hasattr(there, field) and field not in ("text_config", "head_dim"):  # transformers fills these in
            assert getattr(there, field) == default, field
    assert made.to_spec().layers > 0


@pytest.mark.parametrize("name", CLASSES)
def test_documented_forwards(name: str) -> None:
    arguments, output = FORWARDS[name]
    parameters = list(inspect.signature(getattr(monoblock, name).forward).parameters.values())[1:]
    *named, rest = parameters
    assert [p.name for p in named] == arguments.split()
    assert {p.name: p.default for p in named if p.default is not None} in ({}, {"logits_to_keep": 0})
    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    assert family_of(name).model_class(name).output == output
    assert hasattr(monoblock.outputs, output)


def test_every_class_is_in_the_table() -> None:
    assert FORWARDS.keys() == CLASSES.keys()


@pytest.mark.parametrize("name", ["OpenAIGPTConfig", "GPTNeoConfig"])
def test_common_names_of_config_fields(name: str) -> None:
    config, there = getattr(monoblock, name)(), getattr(transformers, name)()
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(config, field) == getattr(there, field)
    config.num_hidden_layers = 3
    assert (config.n_layer if name == "OpenAIGPTConfig" else config.num_layers) == 3


def test_gradient_checkpointing_from_the_config(logs: pytest.LogCaptureFixture) -> None:
    """Fine-tuned checkpoints of 2021 have this field."""
    model = monoblock_model("GPTNeoForCausalLM", **fields("gpt_neo", gradient_checkpointing=True))
    assert model.is_gradient_checkpointing
    assert not logs.messages
    assert not monoblock_model("GPTNeoForCausalLM", **fields("gpt_neo")).is_gradient_checkpointing


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "training run"])
@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM", "OpenAIGPTLMHeadModel"])
def test_pickled_parameters_load(name: str, nested: bool, tmp_path: Path) -> None:
    """A .bin file of `nn.Parameter`s, as saved from `dict(model.named_parameters())`, with q, k and v fused."""
    theirs, ours = pair(name)
    tensors: dict[str, Any] = {key: torch.nn.Parameter(t.clone()) for key, t in theirs.state_dict().items()}
    ours.config.save_pretrained(tmp_path)
    torch.save({"state_dict": tensors} if nested else tensors, tmp_path / "pytorch_model.bin")
    read = getattr(monoblock, name).from_pretrained(tmp_path)
    ids, _ = model_inputs(name, "none")
    assert torch.equal(logits_of(read(ids)), logits_of(ours(ids)))
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in read.parameters())


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name] in ("causal", "masked")])
def test_models_can_be_pickled(name: str, tmp_path: Path) -> None:
    """By `pickle` and by `torch.save(model)`: the class is found by its name, and no attribute is a lambda."""
    _, ours = pair(name)
    ids, mask = model_inputs(name)
    wanted = logits_of(ours(ids, attention_mask=mask))
    torch.save(ours, tmp_path / "model.pt")
    for again in (
        pickle.loads(pickle.dumps(ours)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert type(again) is type(ours)
        assert torch.equal(logits_of(again(ids, attention_mask=mask)), wanted)


def test_activations_can_be_pickled() -> None:
    assert all(pickle.loads(pickle.dumps(act)) is act for act in ACT.values())
