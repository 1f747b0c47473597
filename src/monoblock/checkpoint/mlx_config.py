"""The declaration of weights that MLX quantised: `quantization` in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief

MLX = "mlx"
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class MlxForm:
    """Bits of a code, and the inputs that share a scale."""

    bits: int
    group: int


@dataclass(frozen=True, kw_only=True)
class MlxDeclaration:
    """How MLX quantised weights: the form of all matrices but those of `modules`. `noted`: see PackedDeclaration."""

    form: MlxForm
    modules: Mapping[str, MlxForm] = field(default_factory=dict[str, MlxForm])
    source: str = MLX
    noted: str | None = None

    @property
    def bits(self) -> int:
        """The bits of the format that keeps most matrices."""
        return kept_bits(self.form.bits)

    @property
    def group(self) -> int:
        """The inputs that share a scale in most matrices."""
        return self.form.group

    def of(self, stem: str) -> MlxForm:
        """The form of a matrix, by its name without ".weight"."""
        return self.modules.get(stem, self.form)


def kept_bits(bits: int) -> int:
    """The bits of this library's format that holds such codes."""
    return 4 if bits <= 4 else 8


def with_method(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config with MLX's `quantization` under `quantization_config`, where the other tools' is; MLX's
    newer files have both."""
    found: Any = fields.get("quantization")
    if (
        not isinstance(found, Mapping)
        or not {"group_size", "bits"} <= cast("Mapping[str, Any]", found).keys()
    ):
        return fields
    rest = {name: value for name, value in fields.items() if name != "quantization"}
    other: Any = rest.get("quantization_config")
    if other is not None and other != found:
        return fields  # another tool's, too: refused
    return {**rest, "quantization_config": {**cast("Mapping[str, Any]", found), "quant_method": MLX}}


def parse_mlx(given: Mapping[str, Any], owner: str) -> MlxDeclaration:
    """The declaration; UnsupportedConfig names `owner` and a field whose value is not supported."""
    form = _form(given, owner)
    modules: dict[str, MlxForm] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            modules[name] = _form(cast("Mapping[str, Any]", value), f"{owner}.{name}")
        elif name not in ("quant_method", "group_size", "bits", "mode") and type(value) is not bool:
            raise UnsupportedConfig(f"{owner}.{name}={brief(value)} is not supported for mlx: unknown field")
    return MlxDeclaration(form=form, modules=modules)


def _form(given: Mapping[str, Any], owner: str) -> MlxForm:
    for name, known in (("mode", (None, "affine")), ("bits", BITS), ("group_size", GROUPS)):
        value = given.get(name)
        if not any(type(value) is type(one) and value == one for one in known):
            expected = " or ".join(map(repr, known))
            raise UnsupportedConfig(
                f"{owner}.{name}={brief(value)} is not supported for mlx: it must be {expected}"
            )
    return MlxForm(bits=given["bits"], group=given["group_size"])
