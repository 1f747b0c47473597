"""The files of one GGUF model: one, or several parts named `...-00001-of-00003.gguf`."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from monoblock.checkpoint.gguf.blocks import FORMS
from monoblock.checkpoint.gguf.header import GgufHeader, GgufTensor, read_gguf
from monoblock.checkpoint.packed import PackedForm, common_form
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # ggml type -> dtype
# Matrices that one product multiplies by, which therefore have one format.
_FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
# Names whose matrices are kept packed; the rest are small.
_MATRIX = re.compile(r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)))\.weight")


@dataclass(frozen=True, kw_only=True)
class GgufKinds:
    """What becomes of the tensors: the model's dtype, (bits, group) of each packed weight, and the names of quantised
    tensors that are dequantised."""

    dtype: str
    packed: Mapping[tuple[int, int], int]
    dequantised: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GgufFiles:
    """The parts of a model, the first of which has the metadata, and all tensors by name."""

    headers: tuple[GgufHeader, ...]
    tensors: Mapping[str, GgufTensor]

    @property
    def first(self) -> GgufHeader:
        """The header with the metadata."""
        return self.headers[0]

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many axes; else CheckpointError."""
        if name not in self.tensors or len(shape := self.tensors[name].shape) != axes:
            raise CheckpointError(
                f"{self.first.path} lacks {name}, or it has not {axes} dimensions: is it complete?"
            )
        return shape

    def kinds(self) -> GgufKinds:
        """What becomes of the tensors."""
        packed: dict[tuple[int, int], int] = {}
        dequantised: list[str] = []
        for name, tensor in self.tensors.items():
            if (form := self.forms.get(name)) is not None:
                key = (form.bits, form.group)
                packed[key] = packed.get(key, 0) + tensor.shape[0] * tensor.shape[1]
            elif tensor.type not in (*PLAIN, "F64"):
                dequantised.append(name)
        plain = {tensor.type for tensor in self.tensors.values() if len(tensor.shape) > 1}
        short = packed or dequantised or "BF16" in plain
        dtype = "bfloat16" if short else "float16" if "F16" in plain else "float32"
        return GgufKinds(dtype=dtype, packed=packed, dequantised=tuple(dequantised))

    @functools.cached_property
    def forms(self) -> Mapping[str, PackedForm]:
        """The formats of the matrices that are kept packed. Those that are fused have one that holds them all; they are
        dequantised if one of them is not packed."""
        own = {name: _form(tensor) for name, tensor in self.tensors.items() if _MATRIX.fullmatch(name)}
        for name in list(own):
            block, _, kind = name.removesuffix(".weight").rpartition(".")
            group = next((group for group in _FUSED if kind == group[0]), ())
            names = [f"{block}.{member}.weight" for member in group]
            if len(names) < 2 or not all(member in own for member in names):
                continue
            forms = [own[member] for member in names]
            held = [form for form in forms if form is not None]
            shared = common_form(held) if len(held) == len(forms) else None
            own |= dict.fromkeys(names, shared)
        return {name: form for name, form in own.items() if form is not None}


def _form(tensor: GgufTensor) -> PackedForm | None:
    """The format of a matrix by itself, None if it is not packed."""
    block = FORMS.get(tensor.type)
    if block is None or len(tensor.shape) != 2:
        return None
    return PackedForm(bits=block.bits, group=block.group, low=block.zero is None, scales=block.stored)


def opened(paths: tuple[Path, ...]) -> GgufFiles:
    """The parts of a model in their order; CheckpointError: they do not belong together, or one is damaged."""
    headers = tuple(read_gguf(path) for path in paths)
    first = headers[0]
    count = first.get("split.count", int, 1) or 1
    if count != len(headers):
        raise CheckpointError(
            f"{first.path} is one of {count} parts (split.count), but {len(headers)} were found"
        )
    tensors: dict[str, GgufTensor] = {}
    for number, header in enumerate(headers):
        if len(headers) > 1 and (header.get("split.no", int), header.get("split.count", int)) != (
            number,
            count,
        ):
            raise CheckpointError(
                f"{header.path} is not part {number + 1} of {count} by its metadata (split.no)"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {brief(name)} is both in {tensors[name].path} and in {header.path}"
                )
            tensors[name] = tensor
    total = first.get("split.tensors.count", int, len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{first.path} counts {total} tensors in all parts, but there are {len(tensors)}"
        )
    return GgufFiles(headers=headers, tensors=tensors)
