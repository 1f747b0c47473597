"""Shared by the configs of several families: activation names, limits, and the forms of RoPE parameters."""

from __future__ import annotations

import math
from typing import Any, TypedDict

from monoblock.checkpoint.keymap import KeyRow, row
from monoblock.config import PretrainedConfig
from monoblock.errors import FieldError, UnsupportedConfig
from monoblock.field_types import brief
from monoblock.spec import RopeScaling, Rotary

# transformers' names of activations -> the spec's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}

# RoPE types -> the spec's kinds; None: no scaling.
ROPE_TYPES = {"default": None, "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}


# Limit on layers, far above published models (some 130): building them takes time before any weight file is read.
MAX_LAYERS = 1024


class RopeFields(TypedDict, total=False):
    """The types of `rope_scaling` and `rope_parameters`."""

    rope_type: str
    type: str
    rope_theta: float
    partial_rotary_factor: float
    factor: float
    original_max_position_embeddings: int | None
    attention_factor: float | None
    low_freq_factor: float | None
    high_freq_factor: float | None
    beta_fast: float | None
    beta_slow: float | None
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool | None


def layers(config: PretrainedConfig, field: str) -> int:
    """The number of layers; FieldError unless it is between 1 and MAX_LAYERS."""
    count: int = getattr(config, field)
    if not 1 <= count <= MAX_LAYERS:
        raise FieldError(
            f"{type(config).__name__}.{field} must be at least 1 and at most {MAX_LAYERS}, got {count}",
            field,
        )
    return count


def activation(config: PretrainedConfig, field: str) -> str:
    """The spec's name of the activation in a field of a config."""
    config.check({field: tuple(ACTIVATIONS)})
    return ACTIVATIONS[getattr(config, field)]


def quotient(config: PretrainedConfig, width: str, heads: str) -> int:
    """width / heads; ValueError if heads does not divide width."""
    w, h = getattr(config, width), getattr(config, heads)
    if w < 1 or h < 1 or w % h:
        raise ValueError(f"{type(config).__name__}.{width} ({w}) must be a multiple of {heads} ({h})")
    return w // h


def head_rows(**names: str) -> dict[str, tuple[KeyRow, ...]]:
    """Key map rows of heads that are a single projection: kind -> its name in files."""
    return {kind: (row("head.out.{p}", name + ".{p}"),) for kind, name in names.items()}


# The implied fields of all decoder families: see `PretrainedConfig.implied`.
CAUSAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "every token attends to itself and the tokens before it")
}

# "finetuned", in YaRN's releases, has no effect on the angles.
_ROPE_KEYS = frozenset({*RopeFields.__annotations__, "finetuned"})
# The kinds of layers in `layer_types`; newer files may have RoPE parameters per kind.
SLIDING, FULL = "sliding_attention", "full_attention"


class RopeConfig(PretrainedConfig):
    """A config with RoPE: reads `rope_parameters` (newer files) or `rope_theta` and `rope_scaling`; writes the
    latter."""

    def finish(self, _given: frozenset[str], /) -> None:
        """Convert `rope_parameters` to `rope_theta` and `rope_scaling`."""
        found: dict[str, Any] = (
            vars(self).pop("rope_parameters", None) or getattr(self, "rope_scaling", None) or {}
        )
        scaling = self._common_parameters(dict(found))
        self.rope_parameters = {name: value for name, value in scaling.items() if value is not None}
        self.check_keys({"rope_parameters": _ROPE_KEYS})
        del self.rope_parameters
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in scaling and name in self.fields:
                setattr(self, name, scaling.pop(name))
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedConfig(
                f"{type(self).__name__} applies RoPE to whole heads, got partial_rotary_factor in {scaling}"
            )
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling.pop("type"))
        self.rope_scaling = scaling if scaling.get("rope_type", "default") != "default" else None

    def _common_parameters(self, scaling: dict[str, Any]) -> dict[str, Any]:
        """The RoPE parameters, from a flat dict or one per kind of layer; UnsupportedConfig if the kinds differ."""
        if not scaling or not scaling.keys() <= {SLIDING, FULL}:
            return scaling
        found = [self._as_mapping(f"rope_parameters.{kind}", inner) for kind, inner in scaling.items()]
        if any(inner != found[0] for inner in found):
            raise UnsupportedConfig(
                f"{type(self).__name__}.rope_parameters differ between {' and '.join(scaling)}: all "
                f"layers share one RoPE, got {brief(scaling)}"
            )
        return found[0]

    def rotary(self, dim: int) -> Rotary:
        """RoPE on the first `dim` channels, with this config's parameters."""
        return Rotary(dim=dim, theta=self.rope_theta, scaling=self._scaling())

    def _scaling(self) -> RopeScaling | None:
        rope: dict[str, Any] = self.rope_scaling or {}
        self.check({"rope_scaling.rope_type": (None, *ROPE_TYPES), "rope_scaling.truncate": (None, True)})
        kind = ROPE_TYPES[rope.get("rope_type", "default")]
        if kind is None:
            return None
        if "factor" not in rope:
            raise UnsupportedConfig(f"{type(self).__name__}.rope_scaling={rope} lacks its factor")
        defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
        return RopeScaling(
            kind=kind,  # pyright: ignore[reportArgumentType]
            factor=rope["factor"],
            original_length=rope.get("original_max_position_embeddings") or self.max_position_embeddings,
            attention_factor=_attention_factor(rope),
            **{name: rope.get(name) or default for name, default in defaults.items()},
        )


def _attention_factor(rope: dict[str, Any]) -> float | None:
    """YaRN's factor on cos and sin: as given, or from both `mscale` fields; None: from `factor`, by YaRN's formula."""
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        if min(rope["mscale"], rope["mscale_all_dim"]) < 0:
            raise UnsupportedConfig(
                f"rope_scaling must have a positive mscale and mscale_all_dim, got {rope}"
            )
        log = 0.1 * math.log(max(rope["factor"], 1.0))
        return (log * rope["mscale"] + 1) / (log * rope["mscale_all_dim"] + 1)
    return rope.get("attention_factor")
