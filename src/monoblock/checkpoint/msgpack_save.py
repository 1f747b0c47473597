"""Write Flax's msgpack files, one array at a time; `msgpack.py` describes the format."""

import logging
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

from monoblock.checkpoint.array_adapters import DTYPE_NAMES, ArrayAdapter, Description, adapter
from monoblock.checkpoint.header import ITEM_BYTES
from monoblock.checkpoint.msgpack import CHUNKED
from monoblock.checkpoint.save import SINGLE as SAFETENSORS
from monoblock.checkpoint.save import LazyTensor, made, save_shards, write_bytes
from monoblock.errors import CheckpointError

log = logging.getLogger("monoblock")

SINGLE = "flax_model.msgpack"
CHUNK = 2**30  # bytes of an array's chunk: Flax's limit, below the format's 2^32

# Files of an earlier save. Variants and other kinds of weights stay.
_STALE = re.compile(r"flax_model(-\d{5}-of-\d{5})?\.msgpack(\.index\.json)?")


def save_msgpack(
    folder: str | Path,
    leaves: Mapping[str, Any],
    *,
    max_shard_size: int | str = "50GB",
    extra_files: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a tree of arrays as flax_model.msgpack, or as shards and their index; returns the files, the index last.

    `leaves`: path in the tree, with slashes ("transformer/wte/embedding") -> NumPy array, or a function that returns
    one (see `save_tensors`). Flax itself can read the file. Other arguments and errors are those of `save_tensors`; at
    most two copies of one tensor exist at a time. Weight files of other kinds stay in the folder; a warning names those
    that `find_weights` would prefer.
    """
    arrays = adapter("np")
    described: dict[str, Description] = {}
    for path, value in leaves.items():
        found = value if isinstance(value, LazyTensor) else arrays.describe(path, made(value))
        described[path] = Description(dtype=found.dtype, shape=found.shape, identity=None)

    def write(file: BinaryIO, part: Mapping[str, Description], metadata: Mapping[str, str]) -> None:
        del metadata  # the format has no field for it
        _write_tree(file, arrays, _tree(part), leaves)

    files = save_shards(
        folder,
        described,
        write,
        single=SINGLE,
        stale=_STALE,
        max_shard_size=max_shard_size,
        extra_files=extra_files,
    )
    if first := [
        name for name in (SAFETENSORS, f"{SAFETENSORS}.index.json") if (Path(folder) / name).is_file()
    ]:
        log.warning(
            "%s also holds %s, which is read in preference to %s: remove the old files",
            folder,
            first[0],
            SINGLE,
        )
    return files


_Tree = dict[str, Any]  # key -> subtree, or the path and the description of an array


def _tree(part: Mapping[str, Description]) -> _Tree:
    root: _Tree = {}
    for path, description in part.items():
        *parents, leaf = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = path, description
    return root


def _write_tree(file: BinaryIO, arrays: ArrayAdapter, tree: _Tree, leaves: Mapping[str, Any]) -> None:
    file.write(_head(_MAP, len(tree)))
    for key, node in tree.items():
        file.write(_text(key))
        if isinstance(node, dict):
            _write_tree(file, arrays, cast(_Tree, node), leaves)
        else:
            path, description = cast(tuple[str, Description], node)
            raw = arrays.raw(made(leaves[path]))
            if len(raw) != prod(description.shape) * ITEM_BYTES[description.dtype]:
                raise CheckpointError(
                    f"tensor '{path}' has not the size that its declared shape and dtype need"
                )
            _write_array(file, raw, description)


def _write_array(file: BinaryIO, raw: memoryview, description: Description) -> None:
    """Write an array as an extension, or as a map of chunks if it is larger than `CHUNK`."""
    if len(raw) <= CHUNK:
        _write_chunk(file, raw, description.dtype, description.shape)
        return
    width = ITEM_BYTES[description.dtype]
    step = CHUNK // width * width
    starts = range(0, len(raw), step)
    file.write(_head(_MAP, 3) + _text(CHUNKED) + b"\xc3" + _text("shape"))
    sizes = b"".join(_text(str(i)) + _size(n) for i, n in enumerate(description.shape))
    file.write(_head(_MAP, len(description.shape)) + sizes + _text("chunks") + _head(_MAP, len(starts)))
    for i, start in enumerate(starts):
        chunk = raw[start : start + step]
        file.write(_text(str(i)))
        _write_chunk(file, chunk, description.dtype, (len(chunk) // width,))


def _write_chunk(file: BinaryIO, raw: memoryview, dtype: str, shape: tuple[int, ...]) -> None:
    sizes = b"".join(map(_size, shape))
    head = b"\x93" + _head(_LIST, len(shape)) + sizes + _text(DTYPE_NAMES[dtype]) + _head(_BYTES, len(raw))
    file.write(_head(_EXTENSION, len(head) + len(raw)) + b"\x01" + head)
    write_bytes(file, raw)


# Sizes are always written in their widest form, which costs a few bytes.
_BYTES, _EXTENSION, _TEXT, _LIST, _MAP = 0xC6, 0xC9, 0xDB, 0xDD, 0xDF


def _head(tag: int, count: int) -> bytes:
    return struct.pack(">BI", tag, count)


def _size(number: int) -> bytes:
    return struct.pack(">BQ", 0xCF, number)


def _text(text: str) -> bytes:
    raw = text.encode()
    return _head(_TEXT, len(raw)) + raw
