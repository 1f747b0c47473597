"""The declaration of weights that GPTQ, AWQ or compressed-tensors quantised: `quantization_config` in config.json, or a
file beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief

# Files with a declaration, which older tools wrote instead of config.json's field: file -> method.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_FORMATS = ("gptq", "gptq_v2")
COMPRESSED = "compressed-tensors"
# Formats of compressed-tensors that are kept packed -> the layout of codes.
_LAYOUTS = {"pack-quantized": "words", "int-quantized": "int8"}
BITSANDBYTES = "bitsandbytes"
METHODS = ("gptq", "awq", COMPRESSED)
# Fields that change the layout: the values without effect, and what others mean.
_REFUSED: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "gptq": {
        "dynamic": ((None, {}, False), "settings by module"),
        "pack_dtype": ((None, "int32"), "codes in other words than int32"),
        "is_marlin_format": ((None, False), "Marlin's layout"),
        "lora": ((None, False, {}), "adapters within the weights"),
    },
    "awq": {
        "exllama_config": ((None, {}), ""),
        "zero_point": ((True,), "symmetric AWQ"),
    },
}


@dataclass(frozen=True, kw_only=True)
class PackedDeclaration:
    """How weights were quantised.

    `source`: "gptq", "awq", "compressed-tensors" or "bitsandbytes". `layout`: "qweight" for the first two, "words" or
    "int8" for the third, "scb" for the last (packed_tensors.py). `group`: inputs that share a scale (None: all of a
    row). `symmetric`: whether all zero points are the middle code, which is checked. `offset`: what is added to stored
    zero points: 1 in GPTQ's first format. `noted`: a default that was taken, for a log line.
    """

    source: str
    bits: int
    group: int | None
    symmetric: bool
    offset: int
    layout: str = "qweight"
    noted: str | None = None


def parse_declaration(given: Mapping[str, Any], owner: str, method: str | None = None) -> PackedDeclaration:
    """The declaration in a dict of config.json, or (`method`) of another file; UnsupportedConfig names `owner` and a
    field that is missing, or whose value is not supported."""
    method = given.get("quant_method") or method
    method = method.lower() if isinstance(method, str) else method
    assert method in METHODS
    if method == COMPRESSED:
        return _compressed(given, owner)

    def refuse(field: str, why: str) -> UnsupportedConfig:
        return UnsupportedConfig(
            f"{owner}.{field}={brief(given.get(field))} is not supported for {method}: {why}"
        )

    for field, (allowed, what) in _REFUSED[method].items():
        if field != "exllama_config" and not any(given.get(field) == value for value in allowed):
            raise refuse(field, f"{what}; it must be {' or '.join(map(repr, allowed))}")
    names = ("bits", "w_bit"), ("group_size", "q_group_size")
    bits, group = (next((given[n] for n in pair if n in given), None) for pair in names)
    known = (4, 8) if method == "gptq" else (4,)
    if type(bits) is not int or bits not in known:
        raise refuse("bits", f"it must be {' or '.join(map(str, known))}")
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 20):
        raise refuse("group_size", "it must be a positive integer, or -1 for one group in each row")
    if method == "awq":
        version = given.get("version")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise refuse("version", "only the layout 'gemm' is")
        return PackedDeclaration(source=method, bits=bits, group=_group(group), symmetric=False, offset=0)
    layout = given.get("checkpoint_format", given.get("format"))
    if layout is not None and layout not in _FORMATS:
        raise refuse("checkpoint_format", f"it must be {' or '.join(map(repr, _FORMATS))}")
    symmetric = given.get("sym", False)
    if type(symmetric) is not bool:
        raise refuse("sym", "it must be true or false")
    return PackedDeclaration(
        source=method,
        bits=bits,
        group=_group(group),
        symmetric=symmetric,
        offset=0 if layout == "gptq_v2" else 1,
        noted=None if layout else f"{owner} lacks checkpoint_format: it is 'gptq', GPTQ's first format",
    )


@dataclass(frozen=True, kw_only=True)
class CompressedScheme:
    """How compressed-tensors quantised all matrices: the format, the fields of `weights`, and whether activations are
    quantised."""

    owner: str
    layout: str
    weights: Mapping[str, Any]
    activations: bool

    def check(self, field: str, fits: bool, wanted: str) -> None:
        """UnsupportedConfig unless a field of `weights` fits."""
        if not fits:
            raise _refused(
                self.owner, f"config_groups.weights.{field}", self.weights[field], f"it must be {wanted}"
            )


def compressed_scheme(given: Mapping[str, Any], owner: str, layouts: Iterable[str]) -> CompressedScheme:
    """The scheme of compressed-tensors, in one of these formats, which must be one for all matrices."""
    layout: Any = given.get("format")
    if layout not in tuple(layouts):
        known = " or ".join(map(repr, (*_LAYOUTS, "float-quantized")))
        raise _refused(owner, "format", layout, f"it must be {known}")
    for field in ("kv_cache_scheme", "transform_config"):
        if given.get(field):
            raise _refused(owner, field, given[field], "it must be None")
    sparsity: Any = given.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and cast("Any", sparsity).get("format") == "dense"):
        raise _refused(owner, "sparsity_config", sparsity, "weights must be dense")
    groups: Any = given.get("config_groups")
    schemes: list[Any] = (
        list(cast("Mapping[str, Any]", groups).values()) if isinstance(groups, Mapping) else []
    )
    if not schemes or not all(_has_weights(scheme) for scheme in schemes):
        raise _refused(owner, "config_groups", groups, "each group needs weights")
    names = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic")
    found = [{name: scheme["weights"].get(name) for name in names} for scheme in schemes]
    if any(other != found[0] for other in found) or any(
        s.get("format") not in (None, layout) for s in schemes
    ):
        raise _refused(owner, "config_groups", groups, "its groups must quantise weights alike")
    quantised = any(scheme.get("input_activations") or scheme.get("output_activations") for scheme in schemes)
    scheme = CompressedScheme(owner=owner, layout=layout, weights=found[0], activations=quantised)
    scheme.check("dynamic", not found[0]["dynamic"], "false")
    return scheme


def _compressed(given: Mapping[str, Any], owner: str) -> PackedDeclaration:
    scheme = compressed_scheme(given, owner, _LAYOUTS)
    how, known = scheme.weights, (8,) if scheme.layout == "int-quantized" else (4, 8)
    grouped, size = how["strategy"] == "group", how["group_size"]
    scheme.check("num_bits", how["num_bits"] in known, " or ".join(map(str, known)))
    scheme.check("type", how["type"] == "int", "'int'")
    strategies = ("group", "channel", "tensor")
    scheme.check("strategy", how["strategy"] in strategies, "'group', 'channel' or 'tensor'")
    scheme.check("symmetric", type(how["symmetric"]) is bool, "true or false")
    scheme.check(
        "group_size", not grouped or (type(size) is int and 0 < size < 1 << 20), "a positive integer"
    )
    return PackedDeclaration(
        source=COMPRESSED,
        bits=how["num_bits"],
        group=size if grouped else None,
        symmetric=how["symmetric"],
        offset=0,
        layout=_LAYOUTS[scheme.layout],
        noted=f"{owner} quantises activations: here they are quantised by the kernels' own rule"
        if scheme.activations
        else None,
    )


def _refused(owner: str, field: str, value: Any, why: str) -> UnsupportedConfig:
    return UnsupportedConfig(f"{owner}.{field}={brief(value)} is not supported: {why}")


def _has_weights(scheme: Any) -> bool:
    weights: Any = cast("Any", scheme).get("weights") if isinstance(scheme, Mapping) else None
    return isinstance(weights, Mapping)


def _group(size: int) -> int | None:
    return None if size == -1 else size
