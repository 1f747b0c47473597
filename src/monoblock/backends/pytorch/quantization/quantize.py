"""Quantisation of a model: the choice of matrices, and their replacement one at a time."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.parts import GROUPS, Part, replace
from monoblock.backends.pytorch.quantization import bitsandbytes, formats, four_bit
from monoblock.backends.pytorch.quantization.modules import (
    QuantizedMatrix,
    matrix,
    plain_module,
    quantized_module,
)
from monoblock.quantization import LOSSLESS, QuantizationConfig, WeightOnlyConfig

# Bits of the token embedding and of the projection to the vocabulary, by the bits of the blocks.
VOCABULARY_BITS = {8: 8, 4: 8, LOSSLESS: LOSSLESS}
# Weights that are quantised before freed memory is returned: few compared to a large model.
RETURN_AFTER = 1 << 25


def quantize(model: ModelBase, how: QuantizationConfig) -> None:
    """Replace the model's matrices by quantised ones. ValueError: already quantised, or the config names an unknown
    module. ImportError: bitsandbytes is not installed."""
    if model.quantization_config is not None:
        raise ValueError("the model's weights are quantised already: call its dequantize() first")
    if isinstance(how, WeightOnlyConfig):
        Quantizer(model, how).finish()
        return
    blocks = [name for name in matrices(model) if name not in _vocabulary(model)]
    kept = _kept(model, blocks, how.llm_int8_skip_modules or ())
    for name in blocks:
        if name not in kept:
            replace(model, name, bitsandbytes.layer(model.get_submodule(name), how))
    model.quantization_config = how


def dequantize(model: ModelBase) -> None:
    """Replace quantised matrices by dequantised ones. ValueError: the model is not quantised by this library."""
    kept = {name: m for name, m in model.named_modules() if isinstance(m, four_bit.FourBitLinear)}
    if not kept and not isinstance(model.quantization_config, WeightOnlyConfig):
        raise ValueError(
            'dequantize() is for weights quantised by quantization_config="int8", "int4" or "lossless"; this '
            "model's are not"
        )
    dtype = model.dtype
    for name, layer in kept.items():
        replace(model, name, four_bit.plain(layer))
    for name, module in list(model.named_modules()):
        # Weights tied to the embedding are restored by tie_weights().
        if isinstance(module, QuantizedMatrix) and f"{name}.weight" not in model.tied():
            replace(model, name, plain_module(module, dtype))
    model.tie_weights()
    model.quantization_config = None


class Quantizer:
    """Quantises the matrices of a model while they are loaded (`put`), and the remaining ones in `finish`."""

    def __init__(self, model: ModelBase, how: WeightOnlyConfig) -> None:
        if how.source is not None:
            raise ValueError(
                f"WeightOnlyConfig.source={how.source!r} marks weights that were quantised elsewhere: leave it out"
            )
        self.model, self.how, self.unreturned = model, how, 0
        names = list(matrices(model))
        kept = _kept(model, names, how.modules_to_not_convert or ())
        for second, first in model.tied().items():  # one matrix, under both names
            second, first = second.rpartition(".")[0], first.rpartition(".")[0]
            kept |= {first} if second in kept else set()
            names = [name for name in names if name != second]
        self.bits = {
            name: VOCABULARY_BITS[how.bits] if name in _vocabulary(model) else how.bits
            for name in names
            if name not in kept
        }

    def put(self, path: str, tensor: Tensor) -> None:
        """Assign the tensor to the parameter of that name, or replace the module by one with the quantised matrix."""
        name, _, last = path.rpartition(".")
        if last != "weight" or name not in self.bits:
            loading.assign(self.model, path, tensor)
            return
        module = self.model.get_submodule(name)
        try:
            quantized = formats.pack(matrix(module, tensor.detach()), self.bits[name], self.how.group_size)
        except formats.DoesNotFit:
            self.bits.pop(name)  # it stays unquantised
            loading.assign(self.model, path, tensor)
            return
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        replace(self.model, name, quantized_module(module, quantized, tensor.dtype))
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Part):
            owner.fuse_groups()  # now, to free the memory of the separate tensors
        self.unreturned += tensor.numel()
        if self.unreturned > RETURN_AFTER:
            self.unreturned = 0
            return_free_memory()

    def finish(self) -> None:
        """Quantise the matrices that are not yet quantised."""
        for name in list(self.bits):
            module = self.model.get_submodule(name)
            if not isinstance(module, QuantizedMatrix):
                self.put(f"{name}.weight", module.get_parameter("weight"))
        self._unpack_mixed()
        self.model.tie_weights()
        self.model.fuse_weights()
        self.model.quantization_config = self.how

    def _unpack_mixed(self) -> None:
        """If one matrix of a fused group did not fit, dequantise the others of the group too."""
        for group in _groups(self.model) if self.how.bits == LOSSLESS else ():
            members = {name: self.model.get_submodule(name) for name in group}
            if len({isinstance(member, QuantizedMatrix) for member in members.values()}) > 1:
                for name, member in members.items():
                    if isinstance(member, QuantizedMatrix):
                        replace(self.model, name, plain_module(member, torch.bfloat16))


def return_free_memory() -> None:
    """Return freed memory to the system (malloc_trim of glibc): alternating allocations of some megabytes fragment the
    heap, and the holes stay resident."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def matrices(model: ModelBase) -> dict[str, nn.Module]:
    """The modules that can be quantised, by name: the matrices of the blocks, the token embedding, and the projection
    to the vocabulary."""
    found: dict[str, nn.Module] = {model.module_path("embed"): model.get_input_embeddings()}
    layers = model.module_path("layers")
    for name, module in model.get_submodule(layers).named_modules(prefix=layers):
        if isinstance(module, nn.Linear | Conv1D | QuantizedMatrix) and ".lora_" not in name:
            found[name] = module
    if (out := model.get_output_embeddings()) is not None:
        found[model.module_path("head_out")] = out
    return found


def _vocabulary(model: ModelBase) -> set[str]:
    """The names of the embedding and of the projection to the vocabulary."""
    return {model.module_path("embed")} | (
        {model.module_path("head_out")} if model.get_output_embeddings() is not None else set()
    )


def _kept(model: ModelBase, names: Iterable[str], asked: Iterable[str]) -> set[str]:
    """The modules that stay unquantised. ValueError: a name matches no module of the model.

    Each entry of `asked` is a sequence of components of a module's path ("lm_head", "mlp.down_proj", "layers.0"). All
    matrices of a fused group are kept together.
    """
    known, names = [name for name, _ in model.named_modules() if name], list(names)
    for entry in asked:
        if not any(_within(entry, name) for name in known):
            raise ValueError(
                f"modules_to_not_convert (or llm_int8_skip_modules) names {entry!r}, which is no module of this model"
            )
    kept = {name for name in names if any(_within(entry, name) for entry in asked)}
    for group in _groups(model):
        if kept & set(group):
            kept |= set(group) & set(names)
    return kept


def _groups(model: ModelBase) -> list[tuple[str, ...]]:
    """The names of the fused groups' matrices: a group is quantised as a whole, or not at all."""
    groups: list[tuple[str, ...]] = []
    for name, part in model.named_modules():
        if isinstance(part, Part):
            groups += [
                tuple(f"{name}.{part.roles[r]}" for r in group)
                for group in GROUPS
                if all(map(part.has, group))
            ]
    return groups


def _within(entry: str, name: str) -> bool:
    return f".{entry}." in f".{name}."
