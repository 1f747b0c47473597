"""Stores of matrices that other tools quantised: recognised, checked against their declaration, and read in this
library's formats."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from monoblock.checkpoint.array_adapters import Framework
from monoblock.checkpoint.bnb_tensors import FourBitTensors
from monoblock.checkpoint.dense_config import ALL_METHODS, DenseDeclaration, declared
from monoblock.checkpoint.dense_tensors import Float8Tensors
from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.checkpoint.mlx_config import MLX, MlxDeclaration
from monoblock.checkpoint.mlx_tensors import MlxTensors
from monoblock.checkpoint.packed_config import BITSANDBYTES, COMPRESSED, FILES
from monoblock.checkpoint.packed_tensors import PackedTensors, recognised
from monoblock.checkpoint.store import Store
from monoblock.checkpoint.torchao_config import TorchaoDeclaration
from monoblock.checkpoint.torchao_tensors import TorchaoTensors
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

log = logging.getLogger("monoblock")

_TITLES = {"gptq": "GPTQ", "awq": "AWQ", MLX: "MLX", "float8": f"fp8 or {COMPRESSED} (float-quantized)"}


def opened(store: Store, config: Any, name: Any, hub: HubOptions, framework: Framework) -> Tensors:
    """The store, with matrices that other tools quantised in this library's formats or dequantised.

    CheckpointError: neither config.json nor the tool's own file declares them, or they are damaged. UnsupportedConfig:
    the declared layout is not supported. A declaration in the tool's file is added to the config; one of matrices that
    are dequantised is removed from it.
    """
    if (tool := recognised(store)) is None:
        return store
    found: Any = getattr(config, "quantization_config", None)
    owner = f"{type(config).__name__}.quantization_config"
    if found is None:
        for file, method in FILES.items():
            if name is not None and (path := find_file(name, file, hub, required=False)) is not None:
                found, owner = {"quant_method": method, **read_json(path)}, path.name
                config.quantization_config = found
                break
    title = _TITLES.get(tool, tool)
    if found is None:
        raise CheckpointError(
            f"{name} has quantised tensors as {title} writes them, but neither config.json (quantization_config) nor "
            f"{' or '.join(FILES)} declares their bits and groups: restore that file"
        )
    if not isinstance(found, Mapping) or found.get("quant_method") not in ALL_METHODS:  # pyright: ignore
        raise CheckpointError(
            f"{name} has quantised tensors as {title} writes them, but {owner} is {brief(found)}: restore it"
        )
    how = declared(cast("Mapping[str, Any]", found), owner)
    if how.source == BITSANDBYTES:
        declared_tool = f"{BITSANDBYTES} ({4 if isinstance(how, DenseDeclaration) else 8} bits)"
    else:
        declared_tool = "float8" if isinstance(how, DenseDeclaration) else how.source
    if declared_tool != tool:
        named = declared_tool if how.source == BITSANDBYTES else how.source
        raise CheckpointError(f"{owner} declares {named}, but the tensors are those of {title}: correct it")
    if how.noted is not None:
        log.info("%s", how.noted)
    if isinstance(how, DenseDeclaration):
        del config.quantization_config
        return (
            FourBitTensors(store, framework)
            if how.source == BITSANDBYTES
            else Float8Tensors(store, how, framework)
        )
    if isinstance(how, MlxDeclaration):
        return MlxTensors(store, how, framework)
    if isinstance(how, TorchaoDeclaration):
        return TorchaoTensors(store, store.metadata, framework)
    spec = config.to_spec()
    biases = spec.attention.qkv_bias or spec.attention.out_bias or spec.mlp.bias
    return PackedTensors(store, how, framework, biases=biases)
