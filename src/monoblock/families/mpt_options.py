"""MPT's options: their supported values, and the fields of the spec that they determine.

Some are documented by transformers' class, the others by llm-foundry: https://github.com/mosaicml/llm-foundry.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Literal, TypedDict, cast

from monoblock.config import PretrainedConfig
from monoblock.config_fields import COMMON
from monoblock.errors import FieldError, UnsupportedConfig
from monoblock.field_types import brief
from monoblock.spec import Alibi, Learned, Mlp, Norm, Position, QkNorm, RopeScaling, Rotary

NORMS: dict[str, Literal["layer", "rms"]] = {
    "layernorm": "layer",
    "low_precision_layernorm": "layer",
    "rmsnorm": "rms",
    "low_precision_rmsnorm": "rms",
    "triton_rmsnorm": "rms",
}
ATTENTIONS = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
# (name, approximate) of ffn_act_fn -> the spec's activation.
ACTIVATIONS = {
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_tanh",
    ("quick_gelu", "none"): "quick_gelu",
    ("relu", "none"): "relu",
    ("silu", "none"): "silu",
}

# Supported values of options; any other value raises UnsupportedConfig.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attn_config.attn_type": ATTENTIONS,
    "attn_config.attn_impl": ("torch", "flash", "triton"),
    "attn_config.prefix_lm": (False,),
    "attn_config.nope": (False,),
    "attn_config.kv_dim": (None,),
    "attn_config.attn_temperature_tuning.attn_scale": (None, 0.0),
    "attn_config.seq_parallel_world_size": (None, 1),
    "attn_config.rope_impl": ("dail", "hf"),
    "attn_config.rope_dail_config.type": (None, "original"),
    "attn_config.rope_hf_config.type": (None, "no_scaling", "linear", "dynamic", "llama3"),
    "block_overrides": (None, {}),
    "fc_type.name": (None, "torch"),
    "ffn_config.ffn_type": (None, "mptmlp", "mptglu"),
    "norm_type": tuple(NORMS),
}

# Known keys of options that are dicts; any other key would be an ignored option.
KEYS: dict[str, frozenset[str]] = {
    "ffn_config": frozenset({"ffn_type", "ffn_hidden_size", "ffn_act_fn", "fc_type"}),
    "attn_config.rope_dail_config": frozenset({"type", "pos_idx_in_fp32", "xpos_scale_base"}),
    "attn_config.rope_hf_config": frozenset(
        {"type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "attn_config.attn_temperature_tuning": frozenset({"floor_scale", "attn_scale"}),
}


# The same for `attn_config`, by its field names.
_INNER = "attn_config."
_VALUES = {name.removeprefix(_INNER): found for name, found in SUPPORTED.items() if name.startswith(_INNER)}
_KEYS = {name.removeprefix(_INNER): found for name, found in KEYS.items() if name.startswith(_INNER)}

log = logging.getLogger("monoblock")


class ActivationFields(TypedDict, total=False):
    """The types of `ffn_act_fn`: PyTorch's name of an activation, and its argument."""

    name: str
    approximate: str


class FcFields(TypedDict, total=False):
    """The types of `fc_type`."""

    name: str


class FfnFields(TypedDict, total=False):
    """The types of `ffn_config`."""

    ffn_type: str
    ffn_hidden_size: int | None
    ffn_act_fn: ActivationFields | None
    fc_type: str | FcFields | None


class DailFields(TypedDict, total=False):
    """The types of `rope_dail_config`."""

    type: str
    pos_idx_in_fp32: bool
    xpos_scale_base: float | None


class HfRopeFields(TypedDict, total=False):
    """The types of `rope_hf_config`."""

    type: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class TuningFields(TypedDict, total=False):
    """The types of `attn_temperature_tuning`."""

    floor_scale: float
    attn_scale: float | None


class MptAttentionConfig(PretrainedConfig, MutableMapping[str, Any]):
    """The `attn_config` of an `MptConfig`; the fields from `qk_gn` on are llm-foundry's options.

    llm-foundry has a dict here, and model cards write `config.attn_config["attn_impl"] = "triton"`; so this config is
    also a mapping of its fields. Setting an unsupported value as an item raises UnsupportedConfig; fields cannot be
    removed.
    """

    attn_type: str = "multihead_attention"
    attn_pdrop: float = 0
    attn_impl: str = "torch"
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    prefix_lm: bool = False
    qk_ln: bool = False
    attn_uses_sequence_id: bool = False
    alibi: bool = True
    alibi_bias_max: int = 8
    qk_gn: bool = False
    kv_n_heads: int | None = None
    fused_qkv: bool = True
    sliding_window_size: int = -1
    attn_logit_softcapping: float | None = None
    rope: bool = False
    rope_theta: float = 10000
    rope_impl: str = "dail"
    rope_dail_config: DailFields | None = None
    rope_hf_config: HfRopeFields | None = None
    nope: bool = False
    kv_dim: int | None = None
    attn_temperature_tuning: TuningFields | None = None
    seq_parallel_world_size: int | None = None

    implied = {  # noqa: RUF012
        "reuse_kv_layer_idx": ((), "every layer has its own keys and values"),
        "reuse_kv_x_layer_idx": ((), "every layer has its own keys and values"),
    }
    upstream_from = "qk_gn"

    # ------------------------------------------------------------------ as a mapping

    def __getitem__(self, key: str) -> Any:
        if key in self._keys():
            return getattr(self, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str) or (key not in self.fields and hasattr(type(self), key)):  # pyright: ignore
            raise FieldError(f"attn_config has no field {key!r}")
        previous = vars(self).get(key)
        setattr(self, key, value)
        try:
            self.check({name: values for name, values in _VALUES.items() if name.partition(".")[0] == key})
            self.check_keys({name: keys for name, keys in _KEYS.items() if name == key})
        except ValueError:
            vars(self)[key] = previous
            raise
        self._warn_unknown(key)
        if key == "attn_impl" and value != "torch":
            warn_of_kernel(value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"the fields of attn_config cannot be removed: set {key!r} to its default instead")

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def _keys(self) -> list[str]:
        """The names of the fields, including unknown ones, without those common to all configs."""
        other = {*COMMON, "id2label", "label2id", "name_or_path"}
        return [name for name in vars(self) if not name.startswith("_") and name not in other]

    def update(self, config_dict: Any = (), /, **fields: Any) -> None:
        """Set fields, as a dict's `update` does."""
        for name, value in {**dict(config_dict), **fields}.items():
            self[name] = value

    def copy(self) -> MptAttentionConfig:
        """A deep copy."""
        return copy.deepcopy(self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Mapping) and not isinstance(other, PretrainedConfig):
            return dict(self) == dict(cast("Mapping[str, Any]", other))
        return PretrainedConfig.__eq__(self, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def finish(self, given: frozenset[str], /) -> None:
        """`alibi` defaults to True as in transformers, but to False with `rope`, as in llm-foundry."""
        if self.rope and "alibi" not in given:
            self.alibi = False
        # transformers 5 accepts only integers, but most files hold 0.0.
        if self.attn_pdrop == int(self.attn_pdrop):
            self.attn_pdrop = int(self.attn_pdrop)


@functools.cache
def warn_of_kernel(name: str) -> None:
    """Warn once that llm-foundry's kernel names have no effect."""
    log.warning(
        "attn_impl=%r has no effect: all values compute the same function, by the attention that this library selects; "
        "attn_implementation='sdpa', 'eager', 'flex_attention' or 'flash_attention_2' selects another",
        name,
    )


def kv_heads(config: Any) -> int:
    """The number of key and value heads for `attn_type`."""
    att = config.attn_config
    if att.attn_type == "grouped_query_attention" and not att.kv_n_heads:
        raise ValueError("MptConfig.attn_config.kv_n_heads must be given for grouped_query_attention")
    expected = dict(zip(ATTENTIONS, (config.n_heads, 1, att.kv_n_heads), strict=True))[att.attn_type]
    if att.kv_n_heads not in (None, expected):
        raise ValueError(
            f"MptConfig.attn_config.kv_n_heads={att.kv_n_heads} does not match attn_type={att.attn_type!r}, "
            f"which has {expected}; use grouped_query_attention"
        )
    return expected


def window(config: Any) -> int | None:
    """The spec's window, which includes the query's own key; llm-foundry's `sliding_window_size` does not."""
    size = config.attn_config.sliding_window_size
    return None if size < 0 else size + 1


def qk_norm(config: Any, norm: Norm) -> QkNorm | None:
    """`qk_ln` normalises all heads jointly, `qk_gn` each head."""
    att = config.attn_config
    if att.qk_ln and att.qk_gn:
        raise ValueError("MptConfig.attn_config: qk_ln and qk_gn exclude each other; set one of them")
    if not (att.qk_ln or att.qk_gn):
        return None
    return QkNorm(norm=norm, span="head" if att.qk_gn else "width")


def mlp(config: Any, bias: bool) -> Mlp:
    """The MLP given by `ffn_config` and `expansion_ratio`."""
    ffn: dict[str, Any] = config.ffn_config or {}
    width = ffn.get("ffn_hidden_size") or config.d_model * config.expansion_ratio
    if not float(width).is_integer():
        raise ValueError(
            f"MptConfig.expansion_ratio={config.expansion_ratio} times d_model={config.d_model} must be an integer"
        )
    act: dict[str, str] = ffn.get("ffn_act_fn") or {"name": "gelu"}
    name = ACTIVATIONS.get((act.get("name", ""), act.get("approximate", "none")))
    if name is None:
        raise UnsupportedConfig(f"MptConfig.ffn_config.ffn_act_fn={act!r}: not among {sorted(ACTIVATIONS)}")
    return Mlp(width=int(width), act=name, gated=ffn.get("ffn_type") == "mptglu", bias=bias)


def positions(config: Any, head_dim: int) -> tuple[Position, ...]:
    """ALiBi and RoPE if enabled, else a learned table."""
    att = config.attn_config
    found: list[Position] = []
    if att.alibi:
        found.append(Alibi(bias_max=att.alibi_bias_max))
    if att.rope:
        found.append(Rotary(dim=head_dim, theta=att.rope_theta, scaling=_rope_scaling(config)))
    if config.learned_pos_emb and not found:
        found.append(Learned(size=config.max_seq_len))
    return tuple(found)


def _rope_scaling(config: Any) -> RopeScaling | None:
    att = config.attn_config
    rope: dict[str, Any] = dict(att.rope_hf_config or {}) if att.rope_impl == "hf" else {}
    kind = rope.get("type", "no_scaling")
    if kind == "no_scaling":
        return None
    return RopeScaling(
        kind=kind,
        factor=rope.get("factor", 1.0),
        original_length=rope.get("original_max_position_embeddings", config.max_seq_len),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
    )


def logit_scale(config: Any) -> float:
    """The factor that multiplies the logits."""
    scale = config.logit_scale
    if isinstance(scale, str):
        if scale != "inv_sqrt_d_model":
            raise ValueError(
                f"MptConfig.logit_scale must be a number or 'inv_sqrt_d_model', got {brief(scale)}"
            )
        return 1 / math.sqrt(config.d_model)
    return 1.0 if scale is None else scale
