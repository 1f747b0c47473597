"""Quantisation configs: weight-only formats of this library, and bitsandbytes, under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from monoblock.checkpoint.dense_config import ALL_METHODS, DenseDeclaration, declared
from monoblock.checkpoint.mlx_config import MLX
from monoblock.checkpoint.packed_config import BITSANDBYTES, METHODS
from monoblock.checkpoint.torchao_config import TORCHAO
from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief, checked

LOSSLESS = 12  # bits
# The value of `method` in config.json. Older files have it under `quant_method`, but there transformers ignores an
# unknown name and returns a model with random weights; without `quant_method`, transformers raises an error.
METHOD = "monoblock"
# Tools whose quantised weights are read.
SOURCES = ("gguf", *METHODS, BITSANDBYTES, MLX, TORCHAO)
_TITLES = {"gguf": "GGUF", "gptq": "GPTQ", "awq": "AWQ", MLX: "MLX"}


@dataclass(kw_only=True)
class WeightOnlyConfig:
    """Weight-only quantisation to 8 or 4 bits, in groups of `group_size` inputs (64 or 128); activations stay
    floating-point.

    8 bits: one scale per group. 4 bits: a scale and a minimum per group. All matrices of the blocks are quantised to
    `bits`; the token embedding and the language model head to 8 bits. 12 bits: lossless compression of bfloat16
    weights, without groups. `modules_to_not_convert`: names of modules to leave unquantised, as in `named_modules()` or
    in transformers, full or last component.

    `source` ("gguf", "gptq", "awq", "compressed-tensors", "bitsandbytes", "mlx", "torchao") marks weights that another
    tool quantised and that are kept as they are: bits, groups (of 16 to 128) and the choice of matrices are those of
    the tensors, `bits` and `group_size` the most frequent ones. It is set by loading such a checkpoint; weights cannot
    be quantised with it.
    """

    bits: int = 8
    group_size: int = 128
    modules_to_not_convert: list[str] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.source is not None and self.source not in SOURCES:
            known = ", ".join(map(repr, SOURCES))
            raise ValueError(f"WeightOnlyConfig.source must be {known} or None, got {self.source!r}")
        groups = (128, 64) if self.source is None else (128, 64, 32, 16)
        for name, known in (("bits", (8, 4, 12) if self.source is None else (8, 4)), ("group_size", groups)):
            setattr(self, name, checked("WeightOnlyConfig", name, getattr(self, name), int))
            if (value := getattr(self, name)) not in known:
                values = ", ".join(map(str, known[:-1]))
                raise ValueError(f"WeightOnlyConfig.{name} must be {values} or {known[-1]}, got {value!r}")
        if self.bits == LOSSLESS and self.group_size != 128:
            raise ValueError(
                f"WeightOnlyConfig.group_size={self.group_size} is not for 12 bits, which have no groups: remove it"
            )
        names: Any = self.modules_to_not_convert
        if names is not None and not (
            isinstance(names, list | tuple)
            and all(isinstance(name, str) for name in cast("list[Any]", names))
        ):
            raise ValueError(
                f"WeightOnlyConfig.modules_to_not_convert must be a list of names, got {names!r}"
            )

    @property
    def quant_method(self) -> str:
        """The method's name in config.json."""
        return METHOD

    @property
    def summary(self) -> str:
        """A short description, without `modules_to_not_convert`."""
        if self.source is not None:
            tool = _TITLES.get(self.source, self.source)
            return f"by {tool}, kept as it is; most matrices int{self.bits}, groups of {self.group_size}"
        if self.bits == LOSSLESS:
            return f"bfloat16 in {LOSSLESS} bits, without loss"
        return f"int{self.bits}, groups of {self.group_size}; embedding and head in int8"

    def to_dict(self) -> dict[str, Any]:
        """The contents of `quantization_config` in config.json."""
        values = asdict(self)
        if self.source is None:
            del values["source"]
        return {"method": METHOD, **values}


@dataclass(kw_only=True)
class BitsAndBytesConfig:
    """Quantisation of the blocks' weights to 4 or 8 bits by bitsandbytes; embeddings, norms and heads are unquantised.

    `load_in_4bit` with `bnb_4bit_quant_type` "fp4" or "nf4" (arXiv:2305.14314), `bnb_4bit_compute_dtype` (None: the
    model's dtype), `bnb_4bit_use_double_quant`; or `load_in_8bit` with `llm_int8_threshold` (arXiv:2208.07339), which
    casts inputs to float16. `llm_int8_skip_modules`: names of modules, full or last component, to leave unquantised.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = None

    def __post_init__(self) -> None:
        if self.load_in_8bit == self.load_in_4bit:
            raise ValueError("BitsAndBytesConfig needs one of load_in_4bit=True and load_in_8bit=True")
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise ValueError(f"bnb_4bit_quant_type must be 'fp4' or 'nf4', got {self.bnb_4bit_quant_type!r}")
        for name in (
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
            "bnb_4bit_quant_storage",
        ):
            if str(getattr(self, name)).removeprefix("torch.") not in ("False", "None", "uint8"):
                raise ValueError(f"BitsAndBytesConfig.{name}={getattr(self, name)!r} is not supported")

    @property
    def quant_method(self) -> str:
        """The method's name in config.json."""
        return "bitsandbytes"

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)


QuantizationConfig = WeightOnlyConfig | BitsAndBytesConfig

# The strings that `quantization_config` accepts.
WORDS = {"int8": 8, "int4": 4, "lossless": LOSSLESS}

_NAMES = '"int8", "int4", "lossless", a WeightOnlyConfig or a BitsAndBytesConfig'

# Advice for checkpoints quantised by other tools.
_ELSEWHERE = "load the checkpoint's unquantised weights"


def parse_quantization(given: Any, in_4bit: bool = False, in_8bit: bool = False) -> QuantizationConfig | None:
    """The quantisation requested by arguments of from_pretrained, or None; ValueError if they are invalid."""
    if given is not None and (in_4bit or in_8bit):
        raise ValueError("give quantization_config, or load_in_4bit or load_in_8bit, not both")
    if given is None:
        return BitsAndBytesConfig(load_in_4bit=in_4bit, load_in_8bit=in_8bit) if in_4bit or in_8bit else None
    if isinstance(given, WeightOnlyConfig | BitsAndBytesConfig):
        return given
    if isinstance(given, str):
        if given not in WORDS:
            raise ValueError(f"quantization_config must be {_NAMES}, got {given!r}")
        return WeightOnlyConfig(bits=WORDS[given])
    if isinstance(given, Mapping):
        return _of_dict(dict(cast("Mapping[str, Any]", given)))
    # transformers' config classes, recognised by their attributes.
    if callable(getattr(given, "to_dict", None)) and hasattr(given, "quant_method"):
        return _of_dict(dict(given.to_dict()))
    raise ValueError(f"quantization_config must be {_NAMES}, got {given!r}")


def _of_dict(given: dict[str, Any]) -> QuantizationConfig:
    """A config from a dict, whose kind is given by `quant_method` or by its fields."""
    ours = "bits" in given or "group_size" in given
    method = given.get("quant_method") or given.get("method")
    method = getattr(method, "value", method) or (METHOD if ours else "bitsandbytes")
    kinds: dict[str, type[QuantizationConfig]] = {
        METHOD: WeightOnlyConfig,
        "bitsandbytes": BitsAndBytesConfig,
    }
    if not isinstance(method, str) or method not in kinds:
        raise ValueError(
            f"quantization_config with method {brief(method)} is not supported: give {_NAMES}, with "
            "a checkpoint of unquantised weights"
        )
    known = {field.name for field in fields(kinds[method])}
    # transformers' class repeats two fields under private names.
    named = ("quant_method", "method")
    values = {k: v for k, v in given.items() if k not in named and not k.startswith("_load_in_")}
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"{kinds[method].__name__} has no field {brief(unknown[0])}; it has: {', '.join(sorted(known))}"
        )
    return kinds[method](**values)


def stored_quantization(config: Any) -> WeightOnlyConfig | None:
    """The quantisation of weights that stay quantised, from `quantization_config` in a checkpoint's config; None:
    unquantised, or dequantised as they are read.

    UnsupportedConfig for methods of other tools than ALL_METHODS, and for layouts of these that are not read.
    """
    how = _stored(config)
    return None if isinstance(how, DenseDeclaration) else how


def stored_form(config: Any) -> dict[str, Any] | None:
    """`quantization_config` in a checkpoint's config as JSON values, with a `summary`; None: unquantised. Errors as
    those of `stored_quantization`."""
    if (how := _stored(config)) is None:
        return None
    if isinstance(how, DenseDeclaration):
        return asdict(how) | {"summary": how.summary}
    return how.to_dict() | {"summary": how.summary}


def _stored(config: Any) -> WeightOnlyConfig | DenseDeclaration | None:
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    held = cast("Mapping[str, Any]", found if isinstance(found, Mapping) else {})
    if held.get("quant_method") in ALL_METHODS:
        how = declared(held, f"{type(config).__name__}.quantization_config")
        if isinstance(how, DenseDeclaration):
            return how
        group = how.group if how.group in (16, 32, 64, 128) else 128
        return WeightOnlyConfig(bits=how.bits, group_size=group, source=how.source)
    if (method := held.get("quant_method", held.get("method"))) != METHOD:
        what = f"quant_method={brief(method)}" if method else brief(found)
        raise UnsupportedConfig(
            f"{type(config).__name__}.quantization_config={what} is not supported: {_ELSEWHERE}, and quantise them "
            'with from_pretrained(..., quantization_config="int8") or "int4"'
        )
    try:
        own = _of_dict(dict(held))
    except ValueError as error:
        raise UnsupportedConfig(f"{type(config).__name__}.quantization_config: {error}") from error
    assert isinstance(own, WeightOnlyConfig)
    return own
