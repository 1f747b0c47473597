"""The tensors of GGUF files under transformers' names: quantised matrices as components of this library's formats.

The rows of q and k are stored for interleaved RoPE pairs (in each head 0, d/2, 1, d/2 + 1, ...) in the architectures
`llama` and `mistral3`; they are put back in transformers' order, half a head apart.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import re
from collections.abc import Callable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import ArrayAdapter
from monoblock.checkpoint.gguf.blocks import FORMS, BlockForm, Numbers, Scales, TwoLevel
from monoblock.checkpoint.gguf.files import PLAIN, GgufFiles, opened
from monoblock.checkpoint.gguf.header import TYPES, GgufTensor
from monoblock.checkpoint.header import Header, TensorEntry
from monoblock.checkpoint.mapped import Mapped
from monoblock.checkpoint.packed import (
    SUPER_BLOCK,
    TWO_LEVEL,
    ZEROS,
    Array,
    PackedForm,
    pack_codes,
    pack_groups,
)
from monoblock.errors import CheckpointError

log = logging.getLogger("monoblock")

_BLOCKS = {name: (block, width) for name, block, width in TYPES.values()}  # weights and bytes of a block
_NUMPY = {"U8": "u1", "F16": "<f2", "F32": "<f4"}
_CHUNK = 1 << 21  # weights that are unpacked at a time: some megabytes

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "attn_q": "model.layers.{i}.self_attn.q_proj",
    "attn_k": "model.layers.{i}.self_attn.k_proj",
    "attn_v": "model.layers.{i}.self_attn.v_proj",
    "attn_output": "model.layers.{i}.self_attn.o_proj",
    "ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "ffn_up": "model.layers.{i}.mlp.up_proj",
    "ffn_down": "model.layers.{i}.mlp.down_proj",
}
_MPT = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
    "attn_norm": "transformer.blocks.{i}.norm_1",
    "attn_qkv": "transformer.blocks.{i}.attn.Wqkv",
    "attn_q_norm": "transformer.blocks.{i}.attn.q_ln",
    "attn_k_norm": "transformer.blocks.{i}.attn.k_ln",
    "attn_output": "transformer.blocks.{i}.attn.out_proj",
    "ffn_norm": "transformer.blocks.{i}.norm_2",
    "ffn_up": "transformer.blocks.{i}.ffn.up_proj",
    "ffn_down": "transformer.blocks.{i}.ffn.down_proj",
}
# Architecture -> the names of its modules in the file and in transformers.
NAMES: Mapping[str, Mapping[str, str]] = {"llama": _LLAMA, "mistral3": _LLAMA, "mpt": _MPT}
INTERLEAVED = {"llama": ("attn_q", "attn_k"), "mistral3": ("attn_q", "attn_k")}
_NAME = re.compile(r"(?:blk\.(?P<i>\d+)\.)?(?P<module>\w+)\.(?P<leaf>weight|bias)")


def transformers_name(architecture: str, name: str) -> str:
    """The transformers name of a tensor; an unknown name as it is."""
    match = _NAME.fullmatch(name)
    table = NAMES.get(architecture, {})
    if match is None or match["module"] not in table:
        return name
    stem = table[match["module"]]
    if ("{i}" in stem) != (match["i"] is not None):
        return name
    return f"{stem.replace('{i}', match['i'] or '')}.{match['leaf']}"


def file_order(rows: int, heads: int) -> Array:
    """The rows of a file's q or k in transformers' order."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class _Presented:
    """A tensor, or a component of a packed one, as it is presented."""

    tensor: GgufTensor
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Any]


class GgufShard:
    """The tensors of a model's GGUF files, as one shard of a store."""

    def __init__(self, files: GgufFiles, arrays: ArrayAdapter):
        self.path = files.first.path
        self.metadata: Mapping[str, str] = {}
        self.files = files
        self._arrays = arrays
        self._maps = {header.path: _mapped(header.path, files, arrays) for header in files.headers}
        self._presented: dict[str, _Presented] = {}
        architecture = files.first.architecture
        for name, tensor in files.tensors.items():
            self._add(
                name, transformers_name(architecture, name), tensor, self._order(architecture, name, tensor)
            )
        if kept := files.kinds().dequantised:
            log.warning(
                "%s: %d quantised tensors (%s, ...) are of types that are not kept packed, or are fused with one that "
                "is not quantised: they are dequantised to bfloat16",
                self.path,
                len(kept),
                kept[0],
            )

    def names(self) -> KeysView[str]:
        return self._presented.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._presented[name].shape

    def dtype(self, name: str) -> str:
        return self._presented[name].dtype

    def tensor(self, name: str) -> Any:
        return self._presented[name].read()

    def _order(self, architecture: str, name: str, tensor: GgufTensor) -> Array | None:
        """The order of rows for transformers; None: as stored."""
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in INTERLEAVED.get(architecture, ()):
            return None
        get = self.files.first.get
        heads = get(f"{architecture}.attention.head_count", int)
        if match["module"] == "attn_k":
            heads = get(f"{architecture}.attention.head_count_kv", int, heads)
        if heads < 1 or tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{tensor.path}: {name} has {tensor.shape[0]} rows, which {heads} heads do not divide"
            )
        return file_order(tensor.shape[0], heads)

    def _add(self, name: str, own: str, tensor: GgufTensor, order: Array | None) -> None:
        form = self.files.forms.get(name)
        if form is None:
            quantised = tensor.type not in PLAIN
            dtype = "BF16" if quantised else tensor.type
            read = self._dequantised if quantised else self._plain
            self._presented[own] = _Presented(
                tensor=tensor, dtype=dtype, shape=tensor.shape, read=lambda: read(name, tensor, order)
            )
            return
        for part in form.components:
            self._presented[f"{own}.{part}"] = _Presented(
                tensor=tensor,
                dtype=form.dtype(part),
                shape=form.shape(part, tensor.shape),
                read=lambda part=part: self._component(tensor, form, part, order),
            )

    def _plain(self, name: str, tensor: GgufTensor, order: Array | None) -> Any:
        values = self._maps[tensor.path].tensor(name)
        return values if order is None else values[order]

    def _component(self, tensor: GgufTensor, form: PackedForm, part: str, order: Array | None) -> Any:
        made = np.empty(form.shape(part, tensor.shape), _NUMPY[form.dtype(part)])
        for rows, values in _components(tensor, form, part):
            made[rows] = values
        if part != "codes" and not np.isfinite(_numbers(made, tensor, form)).all():
            raise CheckpointError(
                f"{tensor.path} holds scales that are not finite, or beyond fp16: it is damaged"
            )
        if order is not None:
            made = made[order]
        return self._arrays.from_buffer(made, form.dtype(part), made.shape)

    def _dequantised(self, name: str, tensor: GgufTensor, order: Array | None) -> Any:
        made = np.empty(tensor.shape, "<u2")
        for rows, blocks in _chunks(tensor):
            weights = _weights(tensor, blocks).reshape(-1, *tensor.shape[1:])
            made[rows] = casts.cast(weights, "BF16", name).view("<u2").reshape(weights.shape)
        if order is not None:
            made = made[order]
        return self._arrays.from_buffer(made, "BF16", made.shape)


def open_gguf(paths: tuple[Path, ...], arrays: ArrayAdapter) -> GgufShard:
    """The tensors of a model's files; CheckpointError: one is damaged, or they do not belong together."""
    return GgufShard(opened(paths), arrays)


def _mapped(path: Path, files: GgufFiles, arrays: ArrayAdapter) -> Mapped:
    """The unquantised tensors of a file, mapped into memory."""
    entries = {
        name: TensorEntry(dtype=tensor.type, shape=tensor.shape, begin=tensor.begin, end=tensor.end)
        for name, tensor in files.tensors.items()
        if tensor.path == path and tensor.type in PLAIN
    }
    return Mapped(path, arrays, lambda _: Header(entries=entries, metadata={}))


def _chunks(tensor: GgufTensor) -> Iterator[tuple[slice, Array]]:
    """Rows of a quantised tensor and their blocks (blocks, bytes), some megabytes at a time."""
    block, width = _BLOCKS[tensor.type]
    rows, inputs = tensor.shape[0], prod(tensor.shape[1:])
    if len(tensor.shape) == 1:
        rows, inputs = 1, tensor.shape[0]
    bytes_of_row = inputs // block * width
    step = max(1, _CHUNK // inputs)
    with tensor.path.open("rb") as file:
        start = tensor.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            data = mmap.mmap(file.fileno(), tensor.end - start, offset=start, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise CheckpointError(f"{tensor.path} became shorter while it was read: load again") from error
    for first in range(0, rows, step):
        count = min(step, rows - first)
        at = tensor.begin - start + first * bytes_of_row
        whole = np.frombuffer(data, np.uint8, count * bytes_of_row, at)
        where = slice(None) if len(tensor.shape) == 1 else slice(first, first + count)
        yield where, whole.reshape(-1, width)


def _components(tensor: GgufTensor, form: PackedForm, part: str) -> Iterator[tuple[slice, Array]]:
    """A component of some rows at a time, in the layout of the format."""
    block, inputs = FORMS[tensor.type], tensor.shape[1]
    for rows, blocks in _chunks(tensor):
        count = len(range(*rows.indices(tensor.shape[0])))
        if part == "codes":
            codes = block.codes(blocks).reshape(count, inputs)
            if not form.low:
                assert block.zero is not None
                codes = codes + np.uint8(ZEROS[form.bits] - block.zero)
            yield rows, pack_codes(codes, form.bits)
            continue
        values = _scale_and_low(block, blocks, form.scales)[part == "low"]
        if isinstance(values, TwoLevel):
            factors = np.repeat(values.factors, block.group // form.group, axis=1).reshape(count, -1)
            number = np.ascontiguousarray(values.number.reshape(count, -1))
            yield rows, np.concatenate((factors.view(np.uint8), number.view(np.uint8)), axis=1)
        else:
            yield rows, pack_groups(values.reshape(count, -1), block.group, inputs, form, part)


def _numbers(made: Array, tensor: GgufTensor, form: PackedForm) -> Array:
    """The floating-point numbers of stored scales or lows."""
    if form.scales != TWO_LEVEL:
        return made
    return np.ascontiguousarray(made[:, -(tensor.shape[1] // SUPER_BLOCK) * 2 :]).view("<f2")


def _scale_and_low(block: BlockForm, blocks: Array, stored: str) -> tuple[Numbers, Numbers]:
    """Scale and low (blocks, groups), as they are stored; the low of a type with one zero is -zero * scale."""
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged files; what is not finite is refused
        scale, low = _as_stored(block.scales(blocks), stored)
        if low is not None:
            return scale, low
        assert block.zero is not None
        if isinstance(scale, TwoLevel):
            return scale, TwoLevel(scale.number * np.float16(-block.zero), scale.factors)
        return scale, scale * scale.dtype.type(-block.zero)


def _as_stored(numbers: Scales, stored: str) -> Scales:
    if stored != "F32":
        return numbers
    scale, low = (x.values() if isinstance(x, TwoLevel) else x for x in numbers)
    assert scale is not None
    return scale.astype(np.float32), None if low is None else low.astype(np.float32)


def _weights(tensor: GgufTensor, blocks: Array) -> Array:
    """The weights of blocks as float32."""
    if tensor.type == "F64":
        return blocks.view("<f8").astype(np.float32)
    if (form := FORMS.get(tensor.type)) is not None:
        scale, low = _as_stored(form.scales(blocks), "F32")
        assert isinstance(scale, np.ndarray)
        codes = form.codes(blocks).reshape(*scale.shape, form.group).astype(np.float32)
        if form.zero is not None:
            return (codes - np.float32(form.zero)) * scale[..., None]
        assert isinstance(low, np.ndarray)
        return codes * scale[..., None] + low[..., None]
    try:
        package: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            f'{tensor.path} has {tensor.type} weights: pip install "monoblock[gguf]"'
        ) from error
    return package.dequantize(np.ascontiguousarray(blocks), package.GGMLQuantizationType[tensor.type])
