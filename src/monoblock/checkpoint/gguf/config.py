"""The config and the generation config of a GGUF file, as the contents of config.json and generation_config.json."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from monoblock.checkpoint.gguf.files import GgufFiles
from monoblock.errors import CheckpointError, UnsupportedConfig
from monoblock.field_types import brief

log = logging.getLogger("monoblock")

# Settings of architectures that share a name with Mistral's, and the values that mean "off".
_REFUSED = {
    "expert_count": "mixtures of experts",
    "attention.temperature_scale": "attention temperatures by position",
    "rope.scaling.yarn_log_multiplier": "YaRN with a multiplier of its own",
    "attention.sliding_window_pattern": "windows in some layers only",
    "logit_scale": "scaled logits",
    "attention.scale": "an attention scale of its own",
}
_ROPE_TYPES = {"none": None, "linear": "linear", "yarn": "yarn"}


def model_config(files: GgufFiles) -> dict[str, Any]:
    """The content of config.json for these files; CheckpointError: metadata are missing or contradict the tensors;
    UnsupportedConfig: the architecture, or an option of it, is not supported."""
    architecture = files.first.architecture
    if architecture not in _CONFIGS:
        raise UnsupportedConfig(
            f"{files.first.path}: general.architecture={brief(architecture)} is not supported; known are "
            f"{', '.join(_CONFIGS)}"
        )
    config = _CONFIGS[architecture](files, architecture)
    for name in ("bos", "eos", "padding"):
        index = files.first.get(f"tokenizer.ggml.{name}_token_id", int, None)
        config["pad_token_id" if name == "padding" else f"{name}_token_id"] = index
    config["vocab_size"] = files.shape("token_embd.weight", 2)[0]
    config["tie_word_embeddings"] = "output.weight" not in files.tensors
    kinds = files.kinds()
    config["dtype"] = kinds.dtype
    if kinds.packed:
        bits, group = Counter(kinds.packed).most_common(1)[0][0]
        config["quantization_config"] = {
            "method": "monoblock",
            "bits": bits,
            "group_size": group,
            "source": "gguf",
        }
    return config


def generation_config(files: GgufFiles) -> dict[str, Any]:
    """The content of generation_config.json: special tokens, with the end of a turn as another end, and sampling
    options if the file has any."""
    get = files.first.get
    ids = {
        name: get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("bos", "eos", "eot", "padding")
    }
    ends = [ids[name] for name in ("eos", "eot") if ids[name] is not None]
    ends = list(dict.fromkeys(ends))
    found: dict[str, Any] = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": ids["padding"],
    }
    names = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p"}
    sampling = {own: get(f"general.sampling.{name}", float, None) for name, own in names.items()}
    sampling["top_k"] = get("general.sampling.top_k", int, None)
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and sampling.get("temperature") != 0:
        found |= {"do_sample": True, **sampling}
    return {name: value for name, value in found.items() if value is not None}


def _refuse(files: GgufFiles, architecture: str) -> None:
    for key, what in _REFUSED.items():
        value = files.first.metadata.get(f"{architecture}.{key}")
        if value:
            raise UnsupportedConfig(
                f"{files.first.path}: {architecture}.{key}={brief(value)} is not supported: {what}"
            )
    if "rope_freqs.weight" in files.tensors:
        raise UnsupportedConfig(
            f"{files.first.path} has rope_freqs.weight, factors of RoPE's frequencies, which are not supported"
        )


def _default(files: GgufFiles, key: str, kind: type, default: Any) -> Any:
    """The value of a key, or the default that llama.cpp takes, with a log line."""
    value = files.first.get(key, kind, None)
    if value is None:
        log.info("%s lacks %s: as in llama.cpp, it is %s", files.first.path, key, default)
        return default
    return value


def _mistral(files: GgufFiles, architecture: str) -> dict[str, Any]:
    """The architectures `llama` and `mistral3`: Mistral, and Llama's models that compute the same."""
    _refuse(files, architecture)
    get, name = files.first.get, f"{architecture}.".__add__
    heads = get(name("attention.head_count"), int)
    width = get(name("embedding_length"), int)
    if heads < 1:
        raise CheckpointError(
            f"{files.first.path}: {name('attention.head_count')} must be positive, got {heads}"
        )
    head_dim = _default(files, name("attention.key_length"), int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := get(name(key), int, head_dim)) != head_dim:
            raise UnsupportedConfig(
                f"{files.first.path}: {name(key)}={found} is not supported: it must be the head dimension, {head_dim}"
            )
    window = get(name("attention.sliding_window"), int, 0)
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": width,
        "intermediate_size": get(name("feed_forward_length"), int),
        "num_hidden_layers": get(name("block_count"), int),
        "num_attention_heads": heads,
        "num_key_value_heads": _default(files, name("attention.head_count_kv"), int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": get(name("context_length"), int),
        "rms_norm_eps": get(name("attention.layer_norm_rms_epsilon"), float),
        "rope_theta": _default(files, name("rope.freq_base"), float, 10000.0),
        "rope_scaling": _rope_scaling(files, architecture),
        "sliding_window": window or None,
    }


def _rope_scaling(files: GgufFiles, architecture: str) -> dict[str, Any] | None:
    get, name = files.first.get, f"{architecture}.rope.scaling.".__add__
    kind = get(name("type"), str, "none")
    # Old files have the factor alone, for linear scaling.
    if (linear := get(f"{architecture}.rope.scale_linear", float, None)) not in (None, 1.0):
        kind = "linear"
    if kind not in _ROPE_TYPES:
        raise UnsupportedConfig(
            f"{files.first.path}: {name('type')}={brief(kind)} is not supported; known are {', '.join(_ROPE_TYPES)}"
        )
    if (own := _ROPE_TYPES[kind]) is None:
        return None
    factor = get(name("factor"), float, linear) if linear is not None else get(name("factor"), float)
    found: dict[str, Any] = {"rope_type": own, "factor": factor}
    if own == "linear":
        return found
    found["original_max_position_embeddings"] = get(name("original_context_length"), int)
    for key, field in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
        if (value := get(name(key), float, None)) is not None:
            found[field] = value
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (value := get(name(key), float, 1.0)) not in (1.0, -1.0):
            raise UnsupportedConfig(f"{files.first.path}: {name(key)}={value} is not supported: it must be 1")
    return found


def _mpt(files: GgufFiles, architecture: str) -> dict[str, Any]:
    get, name = files.first.get, f"{architecture}.".__add__
    if (act := next((key for key in files.tensors if ".act.scales" in key), None)) is not None:
        raise UnsupportedConfig(
            f"{files.first.path} has {act}, scales of AWQ's activations, which are not supported"
        )
    width, heads = get(name("embedding_length"), int), get(name("attention.head_count"), int)
    kv_heads = get(name("attention.head_count_kv"), int, heads)
    inner = get(name("feed_forward_length"), int)
    if width < 1 or inner % width:
        raise UnsupportedConfig(
            f"{files.first.path}: {name('feed_forward_length')}={inner} must be a multiple of {width}, the width"
        )
    bias = get(name("attention.max_alibi_bias"), float)
    clip = get(name("attention.clamp_kqv"), float, 0.0)
    attention: dict[str, Any] = {
        "alibi": bias > 0,
        "clip_qkv": clip or None,
        "qk_ln": "blk.0.attn_q_norm.weight" in files.tensors,
    }
    if bias > 0:
        if bias != int(bias):
            raise UnsupportedConfig(
                f"{files.first.path}: {name('attention.max_alibi_bias')}={bias} must be an integer"
            )
        attention["alibi_bias_max"] = int(bias)
    if kv_heads != heads:
        attention |= {"attn_type": "grouped_query_attention", "kv_n_heads": kv_heads}
    learned = "position_embd.weight" in files.tensors
    if learned and bias > 0:
        raise UnsupportedConfig(
            f"{files.first.path} has both ALiBi and position_embd.weight, which is not supported"
        )
    return {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "d_model": width,
        "n_heads": heads,
        "n_layers": get(name("block_count"), int),
        "expansion_ratio": inner // width,
        "max_seq_len": get(name("context_length"), int),
        "layer_norm_epsilon": get(name("attention.layer_norm_epsilon"), float),
        "learned_pos_emb": learned,
        "no_bias": not any(key.endswith(".bias") for key in files.tensors),
        "attn_config": attention,
        "use_cache": True,
    }


_CONFIGS = {"llama": _mistral, "mistral3": _mistral, "mpt": _mpt}


def element_counts(files: GgufFiles) -> Mapping[str, int]:
    """Number of weights by ggml type."""
    counts: Counter[str] = Counter()
    for tensor in files.tensors.values():
        counts[tensor.type] += prod(tensor.shape)
    return counts
