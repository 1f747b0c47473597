"""Packed matrices out of a checkpoint's files into a model, and out of a model by the hub's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.formats import Packed
from monoblock.backends.pytorch.quantization.modules import PackedMatrix, packed_module
from monoblock.backends.pytorch.quantization.quantize import Packer, matrices, replace
from monoblock.checkpoint import packed
from monoblock.checkpoint.fitting import matched
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError
from monoblock.quantization import QuantizationConfig, WeightOnlyConfig, recorded

if TYPE_CHECKING:
    from monoblock.backends.pytorch.parameters import Parameters

Device = Callable[[str], torch.device]


def load(
    model: Parameters, store: Tensors, dtype: torch.dtype, device: Device, asked: QuantizationConfig | None
) -> list[str]:
    """Put the packed matrices of the files in their places; returns the names of those that the model has no use for.

    CheckpointError: they do not fit, or config.json does not say how they are packed. ValueError: another
    quantisation was `asked` for.
    """
    if not packed.is_packed(store):
        return []
    if (how := recorded(model.config)) is None:
        raise CheckpointError(
            f"{model.name_or_path or 'the checkpoint'} holds packed weights, but its config.json has no "
            "quantization_config that says how: restore it"
        )
    if asked is not None and asked != how:
        raise ValueError(
            f"the checkpoint's weights are packed already, by {how}: leave quantization_config out, or load the "
            "unquantised weights"
        )
    parts = {name: packed.part(store, name) for name in packed.PARTS}
    names = {_canonical(path): path for path in matrices(model)}
    keymap, tied = packed.by_rows(model.keymap()), model.tied()
    held = keymap.plan([f"{name}.weight" for name in names], parts["codes"], tied).sources
    kinds = {kind: keymap.plan(held, parts[kind], tied).sources for kind in ("scale", "low")}
    expected: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in packed.PARTS}
    for canonical in held:
        module = model.get_submodule(names[canonical.removesuffix(".weight")])
        rows, columns = module.get_parameter("weight").shape
        bits = formats.bits_of(kind for kind, sources in kinds.items() if canonical in sources)
        for part, shape in formats.shapes(bits, how.group_size, rows, columns).items():
            expected[part][canonical] = shape
    found = {
        part: matched(parts[part], keymap, shapes, tied, ignore_mismatched_sizes=False)
        for part, shapes in expected.items()
    }
    for canonical in held:
        path = names[canonical.removesuffix(".weight")]
        tensors = {
            part: loading.read(sources[canonical], parts[part], expected[part][canonical], kind, device(path))
            for part, kind in _DTYPES.items()
            if canonical in (sources := found[part][0])
        }
        module = model.get_submodule(path)
        made = packed_module(module, Packed(**tensors), formats.bits_of(tensors), how.group_size, dtype)
        replace(model, path, made)
    model.quantization_config = how
    return [f"{name}.codes" for name in found["codes"][1].unused]


_DTYPES = {"codes": torch.uint8, "scale": torch.float16, "low": torch.float16}


def packer(model: Parameters, how: QuantizationConfig | None) -> Packer | None:
    """What packs the model while it is loaded, if that is to be."""
    if isinstance(how, WeightOnlyConfig) and model.quantization_config is None:
        return Packer(model, how)
    return None


def modules(model: Parameters) -> dict[str, PackedMatrix]:
    """The packed modules by the canonical names of their matrices, tied ones once."""
    tied = model.tied()
    found = {
        f"{_canonical(path)}.weight": m for path, m in matrices(model).items() if isinstance(m, PackedMatrix)
    }
    return {canonical: module for canonical, module in found.items() if canonical not in tied}


def hub_state(model: Parameters) -> dict[str, Tensor]:
    """The tensors of packed matrices by the hub's names: rows of the model's own tensors wherever that is possible."""
    keymap, state = packed.by_rows(model.keymap()), {}
    for canonical, module in modules(model).items():
        source = keymap.source(canonical)
        for part, tensor in module.packed.items():
            for name, view in zip(source.names, source.op.views(tensor), strict=True):
                state[f"{name}.{part}"] = view.reshape(-1, tensor.shape[1])
    return state


def own_state(model: Parameters, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Tensors of packed matrices by the names of `state_dict()`, of those by the hub's names, kind -> matrix."""
    keymap, tied = packed.by_rows(model.keymap()), model.tied()
    held, state = modules(model), {}
    for part, tensors in parts.items():
        own = {c: t for c, m in held.items() if (t := dict(m.packed.items()).get(part)) is not None}
        for canonical, tensor in loading.split_state(keymap, own, tensors, tied).items():
            for name in (canonical, *(second for second, first in tied.items() if first == canonical)):
                state[f"{_path(name.removesuffix('.weight'))}.{part}"] = tensor
    return state


def _canonical(path: str) -> str:
    return path.removeprefix("backbone.")


def _path(canonical: str) -> str:
    return canonical if canonical.startswith("head.") else "backbone." + canonical


def is_packed(module: nn.Module) -> bool:
    """Whether any matrix in the module is packed."""
    return any(isinstance(inner, PackedMatrix) for inner in module.modules())
