"""OpenAI's release of GPT-1: `params_shapes.json` and `params_0.npy` ... `params_9.npy`.

The .npy files are one long row of numbers, cut into ten: the parameters one after the other, in the order of
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

from monoblock.checkpoint.array_adapters import HUB_NAMES, Array
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
    hub_config,
    local,
)
from monoblock.checkpoint.json_text import parsed
from monoblock.checkpoint.keymap import KeyMap, KeyRow, Op, Same, Spelling, Transposed
from monoblock.checkpoint.weights import Shape, lazy_tensors
from monoblock.errors import CheckpointError, HubError
from monoblock.families.openai_gpt import OpenAIGPTConfig

SHAPES, PIECES = "params_shapes.json", 10

# A layer's parameters in the order of the files: the makers' name, ours, and how it is stored.
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
# The makers' tokenizer files -> the hub's names of the same.
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
    """The parameters in the order of the files."""
    return ["positions", "we", *(f"h{i}/{name}" for i in range(layers) for name, _, _ in LAYER)]


@dataclass(frozen=True)
class ShardedTensors:
    """The parameters as they lie in the row of numbers that the files are cut from."""

    files: tuple[Path, ...]
    arrays: tuple[Array, ...]
    places: Mapping[str, tuple[int, Shape]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def shape(self, name: str) -> Shape:
        return self.places[name][1]

    def dtype(self, name: str) -> str:
        del name
        return HUB_NAMES[self.arrays[0].dtype.name]

    def path(self, name: str) -> Path:
        start, begin = 0, self.places[name][0]
        for file, array in zip(self.files, self.arrays, strict=True):
            start += array.size
            if begin < start:
                return file
        return self.files[-1]

    def tensor(self, name: str) -> Array:
        begin, shape = self.places[name]
        end, start, parts = begin + prod(shape), 0, list[Array]()
        for array in self.arrays:
            parts.append(array[max(begin - start, 0) : max(end - start, 0)])
            start += array.size
        return np.concatenate(parts).reshape(shape)


def recognise(path: Path) -> bool:
    """A folder with params_shapes.json."""
    return path.is_dir() and (path / SHAPES).is_file()


def read(path: Path) -> Checkpoint:
    """A folder of OpenAI's. A config.json in it, if there is one, says what the files do not (`n_head`, ...)."""
    shapes = _read_shapes(path / SHAPES)
    config = _config(path, shapes)
    layers = len(shapes) // len(LAYER)
    files = tuple(path / f"params_{i}.npy" for i in range(PIECES))
    arrays = tuple(_read_piece(file) for file in files)
    needed, found = sum(map(prod, shapes)), sum(array.size for array in arrays)
    if needed != found:
        raise CheckpointError(
            f"{path}: the params_*.npy files hold {found} numbers, but {SHAPES} needs {needed}: fetch them again"
        )
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + prod(shape))
    # A convolution of width 1 has a first axis of size 1.
    plain = [shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for shape in shapes]
    places = {name: (starts[i], plain[i]) for i, name in enumerate(names_of(layers))}
    found_files = companions(path)
    found_files |= {hub: path / name for name, hub in TOKENIZER.items() if (path / name).is_file()}
    return assembled(config, causal_class(config), ShardedTensors(files, arrays, places), KEYMAP, found_files)


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
            f"{path} is no list of GPT-1's shapes: expected the two tables and {len(LAYER)} shapes for each layer"
        )
    return shapes


def _config(path: Path, shapes: list[Shape]) -> OpenAIGPTConfig:
    positions, table = shapes[:2]
    if len(positions) != 2 or len(table) != 2:
        raise CheckpointError(
            f"{path / SHAPES}: the first two shapes are those of tables, got {positions}, {table}"
        )
    layers = len(shapes) // len(LAYER)
    sizes = {"n_positions": positions[0], "vocab_size": table[0], "n_embd": table[1], "n_layer": layers}
    if (path / "config.json").is_file():
        return OpenAIGPTConfig.from_dict(read_json(path / "config.json"), **sizes)
    if table[1] % 64:
        raise CheckpointError(
            f"{path} does not say how many heads the model has: put a config.json with n_head beside {SHAPES} "
            f"(the published model has heads of 64 channels, and {table[1]} is no multiple of that)"
        )
    return OpenAIGPTConfig(**sizes, n_head=table[1] // 64)


def _read_piece(path: Path) -> Array:
    try:
        found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: the release has {PIECES} such files, fetch it again"
        ) from error
    except (
        Exception
    ) as error:  # NumPy evaluates the header as Python's literals, with all that may go wrong then
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no array of numbers ({reason}): fetch it again") from error
    if not isinstance(found, np.ndarray):
        raise CheckpointError(f"{path} is an archive of arrays and no array: fetch it again")
    array = cast("Array", found)
    if array.ndim != 1 or array.dtype.name not in ("float32", "float16", "float64"):
        raise CheckpointError(f"{path} holds {array.dtype} {list(array.shape)}; expected a row of floats")
    return array


def write(folder: Path, checkpoint: Checkpoint, options: Options) -> None:
    """params_shapes.json, ten .npy files of float32, the tokenizer's files, and a config.json for the rest."""
    if options.dtype not in (None, "float32"):
        raise ValueError(f"dtype={options.dtype!r}: OpenAI's files hold float32; leave it out")
    if options.max_shard_size is not None:
        raise ValueError(
            f"max_shard_size={options.max_shard_size!r}: OpenAI's release always has {PIECES} files"
        )
    config = checkpoint.config
    assert isinstance(config, OpenAIGPTConfig)
    if not config.tie_word_embeddings:
        raise ValueError(
            "OpenAI's files have no place for a head that is not tied (tie_word_embeddings=False)"
        )
    makers = lazy_tensors(checkpoint.weights, KEYMAP)
    makers = {name: makers[name] for name in names_of(config.n_layer)}
    count = sum(prod(shape) for shape in checkpoint.weights.shapes().values())
    ends = [count * (i + 1) // PIECES for i in range(PIECES)]
    shapes = _write_pieces(folder, makers, [0, *ends])
    write_atomically(folder / SHAPES, lambda path: path.write_text(json.dumps(shapes), encoding="utf-8"))
    hub_config(config, checkpoint.row, "float32").save_pretrained(folder)
    there = checkpoint.companions
    copy_files(folder, {theirs: there[hub] for theirs, hub in TOKENIZER.items() if hub in there})


def _write_pieces(
    folder: Path, makers: Mapping[str, Callable[[], Array]], cuts: list[int]
) -> list[list[int]]:
    """Write the row of numbers between each two cuts into a file; returns the parameters' shapes."""
    pieces: list[Any] = [
        np.lib.format.open_memmap(folder / f"params_{i}.npy", mode="w+", dtype="<f4", shape=(end - begin,))
        for i, (begin, end) in enumerate(pairwise(cuts))
    ]
    shapes: list[list[int]] = []
    start = 0
    for name, make in makers.items():
        array = cast_array(make(), "F32", name)
        shapes.append([1, *array.shape] if name.endswith("/w") else [*array.shape])
        flat, end = array.reshape(-1), start + array.size
        for piece, (begin, stop) in zip(pieces, pairwise(cuts), strict=True):
            low, high = max(begin, start), min(stop, end)
            if low < high:
                piece[low - begin : high - begin] = flat[low - start : high - start]
        start = end
    for piece in pieces:
        piece.flush()
    return shapes


FORMAT = Format(
    name="openai-gpt",
    title="OpenAI's release of GPT-1",
    recognise=recognise,
    read=local(read),
    write=write,
    model_type="openai-gpt",
)
