"""The declaration of quantised weights that are dequantised as they are read (float8 of "fp8" and compressed-tensors, 4
bits of bitsandbytes), and that of 8 bits of bitsandbytes.

Fields and their meaning: https://huggingface.co/docs/transformers/quantization/finegrained_fp8,
https://docs.vllm.ai/en/latest/features/quantization/fp8 and https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monoblock.checkpoint.mlx_config import MLX, MlxDeclaration, parse_mlx
from monoblock.checkpoint.packed_config import (
    BITSANDBYTES,
    COMPRESSED,
    METHODS,
    PackedDeclaration,
    compressed_scheme,
    parse_declaration,
)
from monoblock.checkpoint.torchao_config import TORCHAO, TorchaoDeclaration, parse_torchao
from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief

FP8 = "fp8"
ALL_METHODS = (*METHODS, FP8, BITSANDBYTES, MLX, TORCHAO)
_MAX_BLOCK = 1 << 20
# Fields of "fp8". Those without an entry in _VALUES list modules, which the tensors show, or are checked on their own.
_FP8_FIELDS = frozenset(
    (
        *(
            "quant_method",
            "activation_scheme",
            "weight_block_size",
            "modules_to_not_convert",
            "ignored_layers",
        ),
        *("fmt", "scale_fmt", "dequantize", "kv_cache_scheme"),
    )
)
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "activation_scheme": (None, "dynamic", "static"),
    "fmt": (None, "e4m3"),
    "scale_fmt": (None, "ue8m0", "float"),
    "dequantize": (None, False, True),
    "kv_cache_scheme": (None,),
}

# Fields of bitsandbytes: those of transformers' BitsAndBytesConfig. Except for those checked below, they concern the
# choice of weights and the computation.
_BNB_FIELDS = frozenset(
    (
        *("quant_method", "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit"),
        *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"),
        *("llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"),
        *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    )
)


@dataclass(frozen=True, kw_only=True)
class DenseDeclaration:
    """How weights were quantised that are dequantised to bfloat16.

    `source`: "fp8", "compressed-tensors" or "bitsandbytes". `per`: "block", "channel" (an output) or "tensor", the
    weights that share a scale; for bitsandbytes "nf4" or "fp4". `block`: outputs and inputs of a block. `noted`: what
    of the declaration is not followed, for a log line.
    """

    source: str
    per: str
    block: tuple[int, int] | None = None
    noted: str | None = None

    @property
    def summary(self) -> str:
        """A short description."""
        if self.source == BITSANDBYTES:
            return f"4 bits ({self.per}) by bitsandbytes; loaded as bfloat16"
        sizes = f"block of {self.block[0]} x {self.block[1]}" if self.block else self.per
        return f"float8 by {self.source}, a scale per {sizes}; loaded as bfloat16"


Declaration = PackedDeclaration | DenseDeclaration | MlxDeclaration | TorchaoDeclaration


def declared(given: Mapping[str, Any], owner: str) -> Declaration:
    """The declaration in a dict whose `quant_method` is in ALL_METHODS; UnsupportedConfig names `owner` and a field
    that is missing, unknown, or whose value is not supported."""
    method = given.get("quant_method")
    if method == MLX:
        return parse_mlx(given, owner)
    if method == TORCHAO:
        return parse_torchao(given, owner)
    if method == FP8:
        return _fp8(given, owner)
    if method == COMPRESSED and given.get("format") == "float-quantized":
        return _compressed_float(given, owner)
    if method == BITSANDBYTES:
        return _bitsandbytes(given, owner)
    return parse_declaration(given, owner)


def _bitsandbytes(given: Mapping[str, Any], owner: str) -> PackedDeclaration | DenseDeclaration:
    for field in given:
        if field not in _BNB_FIELDS:
            known = ", ".join(sorted(_BNB_FIELDS))
            raise UnsupportedConfig(
                f"{owner} of bitsandbytes has the unknown field {brief(field)}; known: {known}"
            )

    def refuse(field: str, why: str) -> UnsupportedConfig:
        return UnsupportedConfig(f"{owner}.{field}={brief(given.get(field))} is not supported: {why}")

    in_8, in_4 = given.get("load_in_8bit", False), given.get("load_in_4bit", False)
    if type(in_8) is not bool or type(in_4) is not bool or in_8 == in_4:
        raise refuse("load_in_4bit", "either it or load_in_8bit must be true")
    if given.get("llm_int8_has_fp16_weight"):
        raise refuse("llm_int8_has_fp16_weight", "weights must be int8")
    if in_8:
        return PackedDeclaration(
            source=BITSANDBYTES,
            bits=8,
            group=None,
            symmetric=True,
            offset=0,
            layout="scb",
            noted=f"{owner}.llm_int8_threshold has no effect: activations are quantised by the kernels' own rule",
        )
    kind = given.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise refuse("bnb_4bit_quant_type", "it must be 'nf4' or 'fp4'")
    return DenseDeclaration(source=BITSANDBYTES, per=kind)


def _fp8(given: Mapping[str, Any], owner: str) -> DenseDeclaration:
    for field in given:
        if field not in _FP8_FIELDS:
            known = ", ".join(sorted(_FP8_FIELDS))
            raise UnsupportedConfig(f"{owner} of fp8 has the unknown field {brief(field)}; known: {known}")
    for field, values in _VALUES.items():
        found = given.get(field)
        if not any(type(found) is type(value) and found == value for value in values):
            raise UnsupportedConfig(
                f"{owner}.{field}={brief(found)} is not supported for fp8: it must be "
                f"{' or '.join(map(repr, values))}"
            )
    block = given.get("weight_block_size")
    return DenseDeclaration(
        source=FP8,
        per="tensor" if block is None else "block",
        block=None if block is None else _block(block, f"{owner}.weight_block_size"),
        noted=_unquantised(owner) if given.get("activation_scheme") else None,
    )


def _compressed_float(given: Mapping[str, Any], owner: str) -> DenseDeclaration:
    scheme = compressed_scheme(given, owner, ("float-quantized",))
    scheme.check("num_bits", scheme.weights["num_bits"] == 8, "8")
    scheme.check("type", scheme.weights["type"] == "float", "'float'")
    per = scheme.weights["strategy"]
    scheme.check("strategy", per in ("tensor", "channel", "block"), "'tensor', 'channel' or 'block'")
    scheme.check("symmetric", scheme.weights["symmetric"] is True, "true")
    block = None
    if per == "block":
        block = _block(scheme.weights["block_structure"], f"{owner}.config_groups.weights.block_structure")
    return DenseDeclaration(
        source=COMPRESSED, per=per, block=block, noted=_unquantised(owner) if scheme.activations else None
    )


def _block(given: Any, where: str) -> tuple[int, int]:
    sizes: list[Any] = list(given) if isinstance(given, list | tuple) else []  # pyright: ignore
    if len(sizes) != 2 or any(type(size) is not int or not 0 < size <= _MAX_BLOCK for size in sizes):
        raise UnsupportedConfig(f"{where}={brief(given)} is not supported: it must be two positive integers")
    return sizes[0], sizes[1]


def _unquantised(owner: str) -> str:
    return f"{owner} quantises activations: here they stay in the model's dtype"
