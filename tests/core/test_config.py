"""MptConfig, and the behaviour of all configs: fields, aliases, labels, files, refused values. No framework."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from monoblock import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    MptAttentionConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    UnsupportedConfig,
)
from monoblock.checkpoint import options as checkpoint_options
from monoblock.families import mpt_options
from monoblock.spec import Alibi, Learned, Rotary

# The signature of MptConfig in both versions of transformers' documentation (the newer one documents `verbose` only).
DOCUMENTED: dict[str, Any] = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "resid_pdrop": 0.0,
    "layer_norm_epsilon": 1e-05,
    "emb_pdrop": 0.0,
    "learned_pos_emb": True,
    "attn_config": None,
    "init_device": "cpu",
    "logit_scale": None,
    "no_bias": True,
    "verbose": 0,
    "embedding_fraction": 1.0,
    "norm_type": "low_precision_layernorm",
    "use_cache": False,
    "initializer_range": 0.02,
}
DOCUMENTED_ATTENTION: dict[str, Any] = {
    "attn_type": "multihead_attention",
    "attn_pdrop": 0,
    "attn_impl": "torch",
    "clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 8,
}
TINY: dict[str, Any] = {"d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("kind", "documented"), [(MptConfig, DOCUMENTED), (MptAttentionConfig, DOCUMENTED_ATTENTION)]
)
def test_signature_and_defaults(kind: Any, documented: dict[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters
    assert list(parameters)[: len(documented)] == list(documented)
    assert {name: parameters[name].default for name in documented} == documented
    assert next(reversed(parameters.values())).kind is inspect.Parameter.VAR_KEYWORD
    made = kind()
    for name, value in documented.items():
        assert getattr(made, name) == value or name == "attn_config"


def test_defaults_describe_mpt_7b_in_all_but_size() -> None:
    spec = MptConfig().to_spec()
    assert (spec.layers, spec.width, spec.vocab, spec.mlp.width) == (24, 2048, 50368, 8192)
    assert spec.positions == (Alibi(bias_max=8),), "learned_pos_emb=True is for models without ALiBi"
    assert spec.attention.scale == pytest.approx(128**-0.5)
    assert not (spec.attention.qkv_bias or spec.mlp.bias or spec.norm.bias)
    assert spec.tie_head


def test_positional_arguments() -> None:
    config = MptConfig(24, 4, 2, attn_config={"clip_qkv": 3})
    assert (config.d_model, config.n_heads, config.n_layers) == (24, 4, 2)
    assert config.attn_config.clip_qkv == 3
    with pytest.raises(TypeError, match="d_model twice"):
        MptConfig(24, d_model=24)
    with pytest.raises(TypeError, match="at most"):
        MptConfig(*range(99))


ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
    "norm_eps": "layer_norm_epsilon",
}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_read_and_write(alias: str) -> None:
    own = ALIASES[alias]
    config = MptConfig(**{alias: 12})
    assert getattr(config, own) == getattr(config, alias) == 12
    setattr(config, alias, 36)
    assert getattr(config, own) == 36
    setattr(config, own, 48)
    assert getattr(config, alias) == 48
    assert alias not in json.loads(config.to_json_string())
    assert json.loads(config.to_json_string())[own] == 48


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="MptConfig has no field 'hidden_dim'"):
        _ = MptConfig().hidden_dim
    assert not hasattr(MptConfig(), "rope_scaling")


# ---------------------------------------------------------------------------- nested configs


def test_attn_config_from_dict_config_or_none() -> None:
    as_dict = MptConfig(attn_config={"alibi_bias_max": 16, "clip_qkv": 6})
    as_config = MptConfig(attn_config=MptAttentionConfig(alibi_bias_max=16, clip_qkv=6))
    assert isinstance(as_dict.attn_config, MptAttentionConfig)
    assert as_dict == as_config
    assert as_dict != MptConfig()
    assert MptConfig(attn_config=None).attn_config == MptAttentionConfig()
    with pytest.raises(ValueError, match=r"MptConfig.attn_config must be a .*dict.*, got 3"):
        MptConfig(attn_config=3)


def test_attn_config_has_the_dict_interface(logs: pytest.LogCaptureFixture) -> None:
    """In llm-foundry it is a dict, and model cards set its items."""
    mpt_options.warn_of_kernel.cache_clear()
    config = MptConfig(**TINY)
    attention = config.attn_config
    for kernel in ("triton", "flash", "triton", "torch"):
        attention["attn_impl"] = kernel
        assert attention.attn_impl == attention["attn_impl"] == kernel
    assert len(logs.messages) == 2  # one for each kernel other than 'torch'
    assert all("compute the same" in m and "attn_implementation='sdpa'" in m for m in logs.messages)
    attention.clip_qkv = 6
    assert (attention.get("clip_qkv"), attention.get("nothing"), attention.get("nothing", 3)) == (6, None, 3)
    assert "alibi" in attention and "nothing" not in attention and "return_dict" not in attention
    assert [*DOCUMENTED_ATTENTION] == [*attention][:10]
    assert len(attention) == len(attention.keys()) == len(attention.items()) == len({**attention})
    attention.update({"clip_qkv": 7, "alibi_bias_max": 4}, qk_ln=True)
    assert (attention.clip_qkv, attention.alibi_bias_max, attention.setdefault("qk_ln", False)) == (
        7,
        4,
        True,
    )
    assert attention == {**attention} == dict(attention) and attention != {"clip_qkv": 7} and attention != {}
    for copied in (
        attention.copy(),
        copy.copy(attention),
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),
    ):
        assert copied == attention and type(copied) is MptAttentionConfig
        copied["clip_qkv"] = 1
        assert attention["clip_qkv"] == 7
    assert (
        MptConfig(**TINY, attn_config=dict(attention)) == config == MptConfig(**TINY, attn_config=attention)
    )
    assert MptConfig.from_dict(json.loads(config.to_json_string())) == config
    assert json.loads(json.dumps(dict(attention)))["qk_ln"] is True
    assert config.to_spec().attention.clip == 7
    attention["colour"] = "blue"  # kept, as in the constructor
    assert "does not know the field 'colour'" in logs.messages[-1]
    assert json.loads(config.to_json_string())["attn_config"]["colour"] == "blue"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attn_impl", "cuda", "attn_impl='cuda' is not supported: it must be 'torch' or 'flash' or 'triton'"),
        ("prefix_lm", True, "prefix_lm=True is not supported: it must be False"),
        ("rope_hf_config", {"speed": 3}, "rope_hf_config.speed is not supported; it may hold factor"),
        ("alibi", "yes", "alibi must be True or False, got 'yes'"),
        ("check", 1, "attn_config has no field 'check'"),
        (3, 1, "attn_config has no field 3"),
    ],
)
def test_invalid_items_of_attn_config_are_refused_when_set(key: Any, value: Any, message: str) -> None:
    attention = MptAttentionConfig()
    with pytest.raises(ValueError, match=re.escape(message)):
        attention[key] = value
    assert attention == MptAttentionConfig()
    with pytest.raises(TypeError, match="cannot be removed: set 'alibi' to its default"):
        del attention["alibi"]
    with pytest.raises(KeyError, match="nothing"):
        _ = attention["nothing"]


def test_trust_remote_code_is_logged_once(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    """By every class that reads files; False logs nothing."""
    MptConfig(**TINY).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    )
    (tmp_path / "generation_config.json").write_text("{}")
    readers = (AutoConfig, MptConfig, AutoTokenizer, PreTrainedTokenizerFast, GenerationConfig)
    for reader in readers:
        checkpoint_options.warn_of_remote_code.cache_clear()
        made = reader.from_pretrained(tmp_path, trust_remote_code=False)
        assert not any("trust_remote_code" in message for message in logs.messages)
        for _ in range(2):
            made = reader.from_pretrained(tmp_path, trust_remote_code=True)
        assert not hasattr(made, "trust_remote_code")
        found = [message for message in logs.messages if "trust_remote_code=True has no effect" in message]
        assert len(found) == 1, reader
        assert "code in a model's folder is never run" in found[0]
        logs.clear()


def test_instances_share_no_state() -> None:
    given = {"clip_qkv": 6}
    one, two = MptConfig(attn_config=given), MptConfig(attn_config=given)
    one.attn_config.clip_qkv = 2
    assert two.attn_config.clip_qkv == 6
    assert given == {"clip_qkv": 6}
    one.id2label[0] = "changed"
    assert two.id2label[0] == "LABEL_0"
    assert MptConfig().attn_config.clip_qkv is None


# ---------------------------------------------------------------------------- labels and dtypes


def test_labels() -> None:
    assert MptConfig().num_labels == 2
    assert MptConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    three = MptConfig(num_labels=3)
    assert three.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = MptConfig(id2label={"0": "no", "1": "yes", "2": "maybe"})
    assert named.num_labels == 3
    assert named.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert named.label2id == {"no": 0, "yes": 1, "maybe": 2}
    named.num_labels = 3
    assert named.id2label[0] == "no", "names stay if their number does not change"
    named.num_labels = 4
    assert named.id2label[0] == "LABEL_0"
    text = json.loads(three.to_json_string())
    assert text["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert "id2label" not in json.loads(MptConfig().to_json_string())


@pytest.mark.parametrize("count", [0, -1])
def test_num_labels_below_one_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="num_labels must be an integer from 1 to"):
        MptConfig(num_labels=count)


def test_num_labels_overrides_the_files(tmp_path: Path) -> None:
    MptConfig(**TINY, id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    config = MptConfig.from_pretrained(tmp_path, num_labels=5)
    assert config.num_labels == 5
    assert config.id2label[4] == "LABEL_4"


class Bfloat16:
    def __str__(self) -> str:
        return "torch.bfloat16"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", Bfloat16()], ids=str)
def test_dtype_and_torch_dtype_are_aliases(name: str, value: Any) -> None:
    config = MptConfig(**{name: value})
    assert config.dtype == config.torch_dtype == "bfloat16"
    assert json.loads(config.to_json_string())["dtype"] == "bfloat16"
    config.torch_dtype = "float16"
    assert config.dtype == "float16"


# ---------------------------------------------------------------------------- files


CHANGED: dict[str, Any] = {
    "d_model": 24,
    "n_heads": 4,
    "n_layers": 3,
    "expansion_ratio": 2.5,
    "max_seq_len": 99,
    "vocab_size": 51,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-3,
    "emb_pdrop": 0.2,
    "learned_pos_emb": False,
    "init_device": "meta",
    "logit_scale": "inv_sqrt_d_model",
    "no_bias": False,
    "verbose": 2,
    "embedding_fraction": 0.5,
    "norm_type": "rmsnorm",
    "use_cache": True,
    "initializer_range": 0.1,
    "head_dim": 8,
    "attention_bias": True,
    "ffn_config": {"ffn_type": "mptglu"},
    "final_logit_softcapping": 3.0,
    "init_config": {"name": "kaiming_normal_"},
    "fc_type": {"name": "torch"},
    "use_pad_tok_in_ffn": False,
    "block_overrides": {},
    "fuse_norm_attn_norm": True,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": [0, 50],
    "problem_type": "regression",
    "architectures": ["MptForCausalLM"],
    "dtype": "float16",
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
}
CHANGED_ATTENTION: dict[str, Any] = {
    "attn_type": "grouped_query_attention",
    "attn_pdrop": 0.1,
    "attn_impl": "flash",
    "clip_qkv": 6.0,
    "softmax_scale": 0.2,
    "qk_ln": True,
    "attn_uses_sequence_id": True,
    "alibi": False,
    "alibi_bias_max": 16,
    "kv_n_heads": 2,
    "fused_qkv": False,
    "sliding_window_size": 7,
    "attn_logit_softcapping": 2.0,
    "rope": True,
    "rope_theta": 500,
    "rope_impl": "hf",
    "rope_hf_config": {"type": "linear", "factor": 2.0},
}


def test_every_field_survives_a_round_trip(tmp_path: Path) -> None:
    config = MptConfig(**CHANGED, attn_config=CHANGED_ATTENTION)
    config.save_pretrained(tmp_path / "made")
    again = MptConfig.from_pretrained(tmp_path / "made")
    assert again == config
    for name, value in CHANGED.items():
        assert getattr(again, name) == value, name
    for name, value in CHANGED_ATTENTION.items():
        assert getattr(again.attn_config, name) == value, name
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "made/config.json").read_bytes()
    assert AutoConfig.from_pretrained(tmp_path / "made") == config
    assert MptConfig.from_json_file(tmp_path / "made/config.json") == config
    assert again.to_spec() == config.to_spec()


def test_llm_foundry_fields_are_written_only_if_set() -> None:
    data = json.loads(MptConfig().to_json_string())
    assert not {"head_dim", "ffn_config", "fc_type"} & data.keys()
    assert not {"rope", "kv_n_heads", "qk_gn"} & data["attn_config"].keys()
    assert data["model_type"] == "mpt"
    assert data["attn_config"]["alibi_bias_max"] == 8, "transformers' fields are always written"


def test_unknown_fields_are_kept_and_logged_once(logs: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = MptConfig(**TINY, colour="blue", attn_config={"flavour": 3})
    for expected in (
        "MptConfig does not know the field 'colour'",
        "MptAttentionConfig does not know the field 'flavour'",
    ):
        assert sum(expected in message for message in logs.messages) == 1
    config.save_pretrained(tmp_path)
    again = MptConfig.from_pretrained(tmp_path)
    assert (again.colour, again.attn_config.flavour) == ("blue", 3)
    assert sum("does not know" in message for message in logs.messages) == 2, "once"


def test_fields_of_old_files_are_not_logged(logs: pytest.LogCaptureFixture) -> None:
    old = {
        "transformers_version": "4.28.1",
        "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
        "top_k": 50,
    }
    config = MptConfig(**old, is_decoder=False, torchscript=False, pruned_heads={}, _commit_hash="abc")
    assert not logs.messages
    assert config.auto_map == old["auto_map"]


def test_keywords_override_the_file_and_unused_ones_are_returned(tmp_path: Path) -> None:
    MptConfig(**TINY).save_pretrained(tmp_path)
    assert MptConfig.from_pretrained(tmp_path, n_layers=1).n_layers == 1
    config, unused = MptConfig.from_pretrained(
        tmp_path, hidden_size=48, colour="blue", return_unused_kwargs=True
    )
    assert config.d_model == 48
    assert unused == {"colour": "blue"}


def test_the_files_model_type_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"reads checkpoints of type 'mpt'.*'llama'"):
        MptConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"monoblock has no family 'llama'; it has: .*mpt"):
        AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json has no model_type"):
        AutoConfig.from_pretrained(tmp_path)
    assert isinstance(AutoConfig.for_model("mpt", d_model=24), MptConfig)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mpt", ')
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        MptConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"there is no folder .*nowhere"):
        MptConfig.from_pretrained(tmp_path / "nowhere")


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="needs a folder"):
        MptConfig().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_repr() -> None:
    text = repr(MptConfig(**TINY))
    assert text.startswith("MptConfig {")
    assert json.loads(text.removeprefix("MptConfig "))["d_model"] == 24


def test_the_base_class_has_no_spec() -> None:
    with pytest.raises(NotImplementedError):
        PretrainedConfig().to_spec()


# ---------------------------------------------------------------------------- refused values


REFUSED: dict[str, dict[str, Any]] = {
    "MptConfig.attn_config.prefix_lm=True": {"attn_config": {"prefix_lm": True}},
    "MptConfig.attn_config.nope=True": {"attn_config": {"nope": True}},
    "MptConfig.attn_config.kv_dim=12": {"attn_config": {"kv_dim": 12}},
    "MptConfig.attn_config.attn_temperature_tuning": {
        "attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1}}
    },
    "MptConfig.attn_config.seq_parallel_world_size=2": {"attn_config": {"seq_parallel_world_size": 2}},
    "MptConfig.attn_config.rope_dail_config": {"attn_config": {"rope_dail_config": {"type": "xpos"}}},
    "MptConfig.attn_config.rope_hf_config": {"attn_config": {"rope_hf_config": {"type": "yarn"}}},
    "MptConfig.attn_config.rope_impl='other'": {"attn_config": {"rope_impl": "other"}},
    "MptConfig.attn_config.attn_type='linear_attention'": {"attn_config": {"attn_type": "linear_attention"}},
    "MptConfig.attn_config.attn_impl='paged'": {"attn_config": {"attn_impl": "paged"}},
    "MptConfig.block_overrides": {"block_overrides": {"order": [{"name": "default"}]}},
    "MptConfig.fc_type": {"fc_type": "te"},
    "MptConfig.ffn_config.ffn_type='mb_moe'": {"ffn_config": {"ffn_type": "mb_moe"}},
    "MptConfig.ffn_config.ffn_act_fn": {"ffn_config": {"ffn_act_fn": {"name": "mish"}}},
    "MptConfig.ffn_config.moe_top_k": {"ffn_config": {"moe_top_k": 2}},
    "MptConfig.attn_config.rope_hf_config.beta_fast": {"attn_config": {"rope_hf_config": {"beta_fast": 8}}},
    "MptConfig.norm_type='batchnorm'": {"norm_type": "batchnorm"},
}
ALWAYS_REFUSED: dict[str, dict[str, Any]] = {
    "MptConfig.is_encoder_decoder=True": {"is_encoder_decoder": True},
    "MptConfig.add_cross_attention=True": {"add_cross_attention": True},
    "MptConfig.torchscript=True": {"torchscript": True},
    "MptConfig.pruned_heads": {"pruned_heads": {"0": [1]}},
    "MptConfig.chunk_size_feed_forward=8": {"chunk_size_feed_forward": 8},
    "MptConfig.quantization_config": {"quantization_config": {"load_in_4bit": True}},
}
INVALID: dict[str, dict[str, Any]] = {
    r"d_model.*24.*n_heads.*5": {"n_heads": 5},
    r"n_heads|heads": {"n_heads": 0},
    r"qk_ln and qk_gn": {"attn_config": {"qk_ln": True, "qk_gn": True}},
    r"kv_n_heads must be given": {"attn_config": {"attn_type": "grouped_query_attention"}},
    r"heads \(4\) must be a multiple of kv_heads \(3\)": {
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}
    },
    r"kv_n_heads=2 does not match attn_type='multihead_attention', which has 4": {
        "attn_config": {"kv_n_heads": 2}
    },
    r"kv_n_heads=2 does not match attn_type='multiquery_attention', which has 1": {
        "attn_config": {"kv_n_heads": 2, "attn_type": "multiquery_attention"}
    },
    r"logit_scale must be a number or 'inv_sqrt_d_model', got 'half'": {"logit_scale": "half"},
    r"expansion_ratio.*integer": {"expansion_ratio": 2.3},
    r"scale must be above 0": {"attn_config": {"softmax_scale": -1.0}},
    r"clip must be above 0": {"attn_config": {"clip_qkv": -6}},
    r"bias_max must be above 0": {"attn_config": {"alibi_bias_max": 0}},
    r"embed dropout": {"emb_pdrop": 1.5},
    r"embed_gradient": {"embedding_fraction": 0},
    r"layers must be at least 1": {"n_layers": 0},
    r"vocab must be at least 1": {"vocab_size": 0},
    r"norm eps": {"layer_norm_epsilon": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_options_are_refused_by_name(name: str) -> None:
    config = MptConfig(**{**TINY, **REFUSED[name]})
    with pytest.raises(UnsupportedConfig) as error:
        config.to_spec()
    assert str(error.value).startswith(name)


@pytest.mark.parametrize("name", ALWAYS_REFUSED)
def test_options_unsupported_by_all_families_are_refused_in_the_constructor(name: str) -> None:
    with pytest.raises(UnsupportedConfig) as error:
        MptConfig(**TINY, **ALWAYS_REFUSED[name])
    assert str(error.value).startswith(name)


@pytest.mark.parametrize("message", INVALID)
def test_invalid_values_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MptConfig(**{**TINY, **INVALID[message]}).to_spec()


def test_an_unknown_problem_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"problem_type must be one of regression, .* got 'ranking'"):
        MptConfig(problem_type="ranking")


# ---------------------------------------------------------------------------- llm-foundry's configs

# In llm-foundry's format: with all defaults, and with options that transformers does not have.
STORYWRITER: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 16,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": 6,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"emb_init_std": None, "init_std": None, "name": "kaiming_normal_", "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 65536,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
FOUNDRY: dict[str, Any] = {
    "model_type": "mpt",
    "d_model": 64,
    "n_heads": 8,
    "n_layers": 4,
    "head_dim": None,
    "expansion_ratio": 2,
    "max_seq_len": 512,
    "vocab_size": 100,
    "attn_config": {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 2,
        "fused_qkv": True,
        "attn_impl": "flash",
        "attn_pdrop": 0.0,
        "qk_ln": False,
        "qk_gn": True,
        "clip_qkv": None,
        "softmax_scale": None,
        "attn_uses_sequence_id": True,
        "sliding_window_size": -1,
        "attn_logit_softcapping": 50.0,
        "alibi": False,
        "alibi_bias_max": 8,
        "rope": True,
        "rope_theta": 500000,
        "rope_impl": "hf",
        "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
        "rope_hf_config": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "kv_dim": None,
        "nope": False,
        "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0},
    },
    "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 96},
    "fc_type": {"name": "torch"},
    "norm_type": "rmsnorm",
    "norm_eps": 1e-6,
    "no_bias": True,
    "attention_bias": False,
    "logit_scale": None,
    "final_logit_softcapping": 30.0,
    "learned_pos_emb": False,
    "tie_word_embeddings": False,
    "use_pad_tok_in_ffn": True,
    "block_overrides": None,
}


def test_the_published_config_of_storywriter(logs: pytest.LogCaptureFixture) -> None:
    config = MptConfig.from_dict(STORYWRITER)
    spec = config.to_spec()
    assert spec.positions == (Alibi(bias_max=16),)
    assert spec.attention.clip == 6
    assert config.max_seq_len == 65536
    assert config.dtype == "bfloat16"
    assert [m for m in logs.messages if "tokenizer_name" not in m] == []


def test_an_llm_foundry_config(logs: pytest.LogCaptureFixture) -> None:
    spec = MptConfig.from_dict(FOUNDRY).to_spec()
    assert not logs.messages
    att, (rotary,) = spec.attention, spec.positions
    assert isinstance(rotary, Rotary)
    assert rotary.theta == 500000
    assert rotary.scaling is not None
    assert (rotary.scaling.kind, rotary.scaling.factor, rotary.scaling.original_length) == (
        "llama3",
        8.0,
        128,
    )
    assert (att.heads, att.kv_heads, att.head_dim, att.softcap) == (8, 2, 8, 50.0)
    assert att.qk_norm is not None
    assert att.qk_norm.span == "head"
    assert att.by_segment
    assert spec.norm.kind == "rms"
    assert spec.norm.eps == 1e-6
    assert spec.mlp.gated
    assert (spec.mlp.width, spec.mlp.act) == (96, "silu")
    assert spec.logit_softcap == 30.0
    assert not spec.tie_head


def test_rope_disables_alibi_unless_both_are_set() -> None:
    assert MptConfig(attn_config={"rope": True}).to_spec().position(Alibi) is None
    both = MptConfig(attn_config={"rope": True, "alibi": True}).to_spec()
    assert both.position(Alibi)
    assert both.position(Rotary)
    plain = MptConfig(max_seq_len=77, attn_config={"alibi": False}).to_spec()
    assert plain.positions == (Learned(size=77),)
