"""The declaration of weights that torchao quantised: `quantization_config` in config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief

TORCHAO = "torchao"
_FIELDS = (
    *("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert"),
    *("include_input_output_embeddings", "untie_embedding_weights"),
)


@dataclass(frozen=True, kw_only=True)
class TorchaoDeclaration:
    """How torchao quantised most weights, for the description; the tensors' metadata decide. `noted`: see
    PackedDeclaration."""

    bits: int
    group: int | None
    source: str = TORCHAO
    noted: str | None = None


def parse_torchao(given: Mapping[str, Any], owner: str) -> TorchaoDeclaration:
    """The declaration; UnsupportedConfig names `owner` and an unknown field."""
    if unknown := next((field for field in given if field not in _FIELDS), None):
        raise UnsupportedConfig(
            f"{owner} of torchao has the unknown field {brief(unknown)}; known: {', '.join(_FIELDS)}"
        )
    # A name, or {"default": {"_type": name, "_data": fields}}.
    text = json.dumps(given.get("quant_type"), default=str).lower()
    size = re.search(r'"group_size": (\d+)', text)
    noted = f"{owner} quantises activations: here they are quantised by the kernels' own rule"
    return TorchaoDeclaration(
        bits=4 if re.search(r"int[1-4](?!\d)", text) else 8,
        group=int(size[1]) if size else None,
        noted=noted if "activation" in text else None,
    )


def member(value: Any, name: str) -> Any:
    """An entry of a mapping; None if it is none, or lacks it."""
    return cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else None
