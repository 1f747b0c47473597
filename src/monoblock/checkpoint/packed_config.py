"""The declaration of weights that GPTQ or AWQ quantised: `quantization_config` in config.json, or a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief

# Files with a declaration, which older tools wrote instead of config.json's field: file -> method.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_FORMATS = ("gptq", "gptq_v2")
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

    `source`: "gptq" or "awq". `group`: inputs that share a scale (None: all of a row). `symmetric`: whether all zero
    points are the middle code, which is checked. `offset`: what is added to stored zero points: 1 in GPTQ's first
    format. `noted`: a default that was taken, for a log line.
    """

    source: str
    bits: int
    group: int | None
    symmetric: bool
    offset: int
    noted: str | None = None


def parse_declaration(given: Mapping[str, Any], owner: str, method: str | None = None) -> PackedDeclaration:
    """The declaration in a dict of config.json, or (`method`) of another file; UnsupportedConfig names `owner` and a
    field that is missing, or whose value is not supported."""
    method = given.get("quant_method") or method
    method = method.lower() if isinstance(method, str) else method
    assert method in ("gptq", "awq")

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


def _group(size: int) -> int | None:
    return None if size == -1 else size
