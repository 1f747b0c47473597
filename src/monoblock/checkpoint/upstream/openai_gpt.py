"""Read and write OpenAI's release format of GPT-1: `params_shapes.json` and `params_0.npy` ... `params_9.npy`.

The .npy files are ten shards of one flat array, which concatenates the flattened parameters in the order of
params_shapes.json. Source: https://github.com/openai/finetune-transformer-lm (train.py).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock.checkpoint.array_adapters import SAFETENSORS_DTYPES, Array
from monoblock.checkpoint.casts import cast as cast_array
from monoblock.checkpoint.files import read_json, write_atomically
from monoblock.checkpoint.folder import copy_files
from monoblock.checkpoint.formats import (
    Checkpoint,
    Format,
    Options,
    assembled,
    causal_class,
    companions,
    config_to_write,
    local,
)
from monoblock.checkpoint.json_text import parsed
from monoblock.checkpoint.keymap import KeyMap, KeyRow, Op, Same, Spelling, Transposed
from monoblock.checkpoint.weights import Shape, lazy_tensors
from monoblock.errors import CheckpointError, HubError
from monoblock.families.openai_gpt import OpenAIGPTConfig

SHAPES, SHARDS = "params_shapes.json", 10

# A layer's parameters in the order of the files: OpenAI's name, canonical name, and stored layout.
LAYER: tuple[tuple[str, str, Op], ...] = (
    ("attn/c_attn/w", "attn.qkv.weight", Transposed()),
    ("attn/c_attn/b", "attn.qkv.bias", Same()),
    ("attn/c_proj/w", "attn.out.weight", Transposed()),
    ("attn/c_proj/b", "attn.out.bias", Same()),
    ("ln_1/g", "norm1.weight", Same()),
    ("ln_1/b", "norm1.bias", Same()),
    ("mlp/c_fc/w", "mlp.up.weight", Transposed()),
    ("mlp/c_fc/b", "mlp.up.bias", Same()),
    ("mlp/c_proj/w", "mlp.down.weight", Transposed()),
    ("mlp/c_proj/b", "mlp.down.bias", Same()),
    ("ln_2/g", "norm2.weight", Same()),
    ("ln_2/b", "norm2.bias", Same()),
)
# OpenAI's tokenizer files -> their names in transformers' format.
TOKENIZER = {"encoder_bpe_40000.json": "vocab.json", "vocab_40000.bpe": "merges.txt"}

KEYMAP = KeyMap(
    rows=(
        KeyRow("pos_embed.weight", (Spelling(("positions",)),)),
        KeyRow("embed.weight", (Spelling(("we",)),)),
        *(KeyRow("blocks.{i}." + ours, (Spelling(("h{i}/" + theirs,), op),)) for theirs, ours, op in LAYER),
    ),
    heads={"causal": (KeyRow("head.out.weight", (Spelling(("we",)),)),)},  # the same tensor
    head="causal",
    prefix="",
)


def names_of(layers: int) -> list[str]:
    """OpenAI's parameter names in the order of the files."""
    return ["positions", "we", *(f"h{i}/{name}" for i in range(layers) for name, _, _ in LAYER)]


@dataclass(frozen=True)
class ShardedTensors:
    """Parameters as slices of the flat array that the shards make up; `slices`: name -> (start, shape)."""

    files: tuple[Path, ...]
    arrays: tuple[Array, ...]
    slices: Mapping[str, tuple[int, Shape]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def shape(self, name: str) -> Shape:
        return self.slices[name][1]

    def dtype(self, name: str) -> str:
        del name
        return SAFETENSORS_DTYPES[self.arrays[0].dtype.name]

    def path(self, name: str) -> Path:
        start, begin = 0, self.slices[name][0]
        for file, array in zip(self.files, self.arrays, strict=True):
            start += array.size
            if begin < start:
                return file
        return self.files[-1]

    def tensor(self, name: str) -> Array:
        begin, shape = self.slices[name]
        end, start, chunks = begin + prod(shape), 0, list[Array]()
        for array in self.arrays:
            chunks.append(array[max(begin - start, 0) : max(end - start, 0)])
            start += array.size
        return np.concatenate(chunks).reshape(shape)


def recognise(path: Path) -> bool:
    """Whether a path is a folder with params_shapes.json."""
    return path.is_dir() and (path / SHAPES).is_file()


def read(path: Path) -> Checkpoint:
    """Read a folder in OpenAI's format. An optional config.json supplies fields that shapes do not imply (`n_head`)."""
    shapes = _read_shapes(path / SHAPES)
    config = _config(path, shapes)
    layers = len(shapes) // len(LAYER)
    files = tuple(path / f"params_{i}.npy" for i in range(SHARDS))
    arrays = tuple(_read_shard(file) for file in files)
    needed, found = sum(map(prod, shapes)), sum(array.size for array in arrays)
    if needed != found:
        raise CheckpointError(
            f"{path}: the params_*.npy files hold {found} values, but {SHAPES} needs {needed}: fetch them again"
        )
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + prod(shape))
    # The matrices of width-1 convolutions have a first axis of size 1.
    plain = [shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for shape in shapes]
    slices = {name: (starts[i], plain[i]) for i, name in enumerate(names_of(layers))}
    found_files = companions(path)
    found_files |= {hub: path / name for name, hub in TOKENIZER.items() if (path / name).is_file()}
    return assembled(config, causal_class(config), ShardedTensors(files, arrays, slices), KEYMAP, found_files)


def _read_shapes(path: Path) -> list[Shape]:
    try:
        content: object = parsed(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise HubError(f"{path.parent} is no release of OpenAI's: it has no {SHAPES}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = cast("list[object]", content) if isinstance(content, list) else []
    shapes = [tuple(cast("list[int]", row)) for row in rows if isinstance(row, list)]
    layers, rest = divmod(len(shapes) - 2, len(LAYER))
    if layers < 1 or rest or not all(type(n) is int and n > 0 for shape in shapes for n in shape):
        raise CheckpointError(
            f"{path} is no list of GPT-1's shapes: expected two embedding tables and {len(LAYER)} shapes for each layer"
        )
    return shapes


def _config(path: Path, shapes: list[Shape]) -> OpenAIGPTConfig:
    positions, table = shapes[:2]
    if len(positions) != 2 or len(table) != 2:
        raise CheckpointError(
            f"{path / SHAPES}: the first two shapes must be those of embedding tables, got {positions}, {table}"
        )
    layers = len(shapes) // len(LAYER)
    sizes = {"n_positions": positions[0], "vocab_size": table[0], "n_embd": table[1], "n_layer": layers}
    if (path / "config.json").is_file():
        return OpenAIGPTConfig.from_dict(read_json(path / "config.json"), **sizes)
    if table[1] % 64:
        raise CheckpointError(
            f"{path} does not give the number of heads: add a config.json with n_head next to {SHAPES} "
            f"(the published model has heads of 64 channels, and {table[1]} is not a multiple of 64)"
        )
    return OpenAIGPTConfig(**sizes, n_head=table[1] // 64)


def _read_shard(path: Path) -> Array:
    try:
        found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: the release has {SHARDS} such files, fetch it again"
        ) from error
    except Exception as error:  # NumPy evaluates the header as a Python literal, which may raise any error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not a numeric array ({reason}): fetch it again") from error
    if not isinstance(found, np.ndarray):
        raise CheckpointError(f"{path} is an archive of arrays, not an array: fetch it again")
    array = cast("Array", found)
    if array.ndim != 1 or array.dtype.name not in ("float32", "float16", "float64"):
        raise CheckpointError(
            f"{path} holds {array.dtype} {list(array.shape)}; expected a flat array of floats"
        )
    return array


def write(folder: Path, checkpoint: Checkpoint, options: Options) -> None:
    """Write params_shapes.json, ten float32 .npy files, tokenizer files, and a config.json for the other fields."""
    if options.dtype not in (None, "float32"):
        raise ValueError(f"dtype={options.dtype!r}: OpenAI's files hold float32; leave it out")
    if options.max_shard_size is not None:
        raise ValueError(
            f"max_shard_size={options.max_shard_size!r}: OpenAI's release always has {SHARDS} files"
        )
    config = checkpoint.config
    assert isinstance(config, OpenAIGPTConfig)
    if not config.tie_word_embeddings:
        raise ValueError("OpenAI's format cannot store an untied head (tie_word_embeddings=False)")
    tensors = lazy_tensors(checkpoint.weights, KEYMAP)
    tensors = {name: tensors[name] for name in names_of(config.n_layer)}
    count = sum(prod(shape) for shape in checkpoint.weights.shapes().values())
    ends = [count * (i + 1) // SHARDS for i in range(SHARDS)]
    shapes = _write_shards(folder, tensors, [0, *ends])
    write_atomically(folder / SHAPES, lambda path: path.write_text(json.dumps(shapes), encoding="utf-8"))
    config_to_write(config, checkpoint.row, "float32").save_pretrained(folder)
    there = checkpoint.companions
    copy_files(folder, {theirs: there[hub] for theirs, hub in TOKENIZER.items() if hub in there})


def _write_shards(
    folder: Path, tensors: Mapping[str, Callable[[], Array]], cuts: list[int]
) -> list[list[int]]:
    """Write the flat array in shards between consecutive `cuts`; returns the parameters' shapes."""
    shards: list[Any] = [
        np.lib.format.open_memmap(folder / f"params_{i}.npy", mode="w+", dtype="<f4", shape=(end - begin,))
        for i, (begin, end) in enumerate(pairwise(cuts))
    ]
    shapes: list[list[int]] = []
    start = 0
    for name, make in tensors.items():
        array = cast_array(make(), "F32", name)
        shapes.append([1, *array.shape] if name.endswith("/w") else [*array.shape])
        flat, end = array.reshape(-1), start + array.size
        for shard, (begin, stop) in zip(shards, pairwise(cuts), strict=True):
            low, high = max(begin, start), min(stop, end)
            if low < high:
                shard[low - begin : high - begin] = flat[low - start : high - start]
        start = end
    for shard in shards:
        shard.flush()
    return shapes


FORMAT = Format(
    name="openai-gpt",
    title="OpenAI's release of GPT-1",
    recognise=recognise,
    read=local(read),
    write=write,
    model_type="openai-gpt",
)
