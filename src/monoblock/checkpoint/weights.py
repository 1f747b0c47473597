"""Checkpoint weights by canonical parameter name: read through a key map, cast, and written through another one.

Everything is NumPy and lazy: a tensor is read when it is requested, and no tensor is cached.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import DTYPE_NAMES, Array
from monoblock.checkpoint.keymap import KeyMap, KeyMatch, Op, TensorSource, nearest
from monoblock.checkpoint.save import LazyTensor
from monoblock.errors import MissingKeys, ShapeMismatch, UnexpectedKeys, UnreadKeys
from monoblock.spec import ArchSpec

Shape = tuple[int, ...]


class Tensors(Protocol):
    """Tensors by their names in a file, such as a `Store`."""

    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> Shape: ...
    def dtype(self, name: str) -> str: ...
    def path(self, name: str) -> Path: ...
    def tensor(self, name: str) -> Array: ...


class CanonicalWeights(Protocol):
    """Weights by canonical parameter name. `dtype` is the safetensors name."""

    def shapes(self) -> Mapping[str, Shape]: ...
    def dtype(self, canonical: str) -> str: ...
    def read(self, canonical: str) -> Array: ...


class StateTensors:
    """A state dict in memory, of PyTorch tensors or arrays of any framework."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        kind = str(self._tensors[name].dtype).rpartition(".")[2]
        return next((stored for stored, known in DTYPE_NAMES.items() if known == kind), kind)

    def path(self, name: str) -> Path:
        del name
        return Path("state_dict")

    def tensor(self, name: str) -> Array:
        tensor = self._tensors[name]
        return tensor.detach() if hasattr(tensor, "detach") else tensor


class RenamedTensors:
    """Tensors under other names; `names` maps new name -> old name, and tensors it does not list are left out."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self._tensors = tensors
        self._names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> Shape:
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self._names[name])

    def path(self, name: str) -> Path:
        return self._tensors.path(self._names[name])

    def tensor(self, name: str) -> Array:
        return self._tensors.tensor(self._names[name])

    @property
    def outputs_first(self) -> bool:
        """See `Store.outputs_first`."""
        return getattr(self._tensors, "outputs_first", False)

    def concatenated(self, names: Sequence[str]) -> Any:
        """See `Store.concatenated`; None unless the tensors are those of a store."""
        join = getattr(self._tensors, "concatenated", None)
        return join([self._names[name] for name in names]) if join else None


class ConcatenatedTensors:
    """Tensor-parallel shards: each file holds a slice of every tensor. Slices are concatenated along the axis on which
    their sizes sum to the `expected` size; a tensor with its expected shape in every file is replicated."""

    def __init__(self, shards: Sequence[Tensors], expected: Mapping[str, Shape]):
        self._shards = shards
        self._expected = expected

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards[0])

    def shape(self, name: str) -> Shape:
        return self._shards[0].shape(name) if self._axis(name) is None else self._expected[name]

    def dtype(self, name: str) -> str:
        return self._shards[0].dtype(name)

    def path(self, name: str) -> Path:
        return self._shards[0].path(name)

    def tensor(self, name: str) -> Array:
        axis = self._axis(name)
        arrays = [shard.tensor(name) for shard in (self._shards[:1] if axis is None else self._shards)]
        return arrays[0] if axis is None else np.concatenate(arrays, axis)

    def _axis(self, name: str) -> int | None:
        """The axis of concatenation; None if the tensor is replicated (or its shapes do not fit, an error raised
        later)."""
        whole, found = self._expected.get(name), [shard.shape(name) for shard in self._shards]
        if whole is None or len(whole) != len(found[0]):
            return None
        for axis, size in enumerate(whole):
            rest = {shape[:axis] + shape[axis + 1 :] for shape in found}
            sizes = sum(shape[axis] for shape in found)
            if sizes == size and rest == {whole[:axis] + whole[axis + 1 :]}:
                return axis
        return None


class FileWeights:
    """Weights read from tensors through the sources of a key map; `open_weights` checks their names and shapes."""

    def __init__(self, tensors: Tensors, shapes: Mapping[str, Shape], sources: Mapping[str, TensorSource]):
        self._tensors = tensors
        self._shapes = shapes
        self._sources = sources

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def dtype(self, canonical: str) -> str:
        found = {self._tensors.dtype(name) for name in self._sources[canonical].names}
        return found.pop() if len(found) == 1 else "F32"

    def read(self, canonical: str) -> Array:
        source, shape = self._sources[canonical], self._shapes[canonical]
        arrays = [self._tensors.tensor(name) for name in source.names]
        if len({casts.dtype_of(array) for array in arrays}) > 1:
            arrays = [casts.cast(array, "F32", canonical) for array in arrays]
        if len(arrays) == 1 and _is_same(source.op, shape):
            return arrays[0].reshape(shape)
        target = np.empty(shape, arrays[0].dtype)
        for view, array in zip(source.op.views(target), arrays, strict=True):
            view[...] = array.reshape(view.shape)
        return target

    def stored(self, canonical: str, op: Op) -> list[Array]:
        """A parameter as the tensors of layout `op`, read without conversion where the files have that layout."""
        source = self._sources[canonical]
        if source.op == op:
            return [self._tensors.tensor(name) for name in source.names]
        whole = self.read(canonical)
        return [_stored(view, whole.ndim) for view in op.views(whole)]


def open_weights(
    tensors: Tensors, keymap: KeyMap, shapes: Mapping[str, Shape], tied: Iterable[str]
) -> tuple[FileWeights, KeyMatch]:
    """The weights of a model whose parameters have these `shapes`, and the match of their names.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit. Tensors of a head
    that the model lacks are no error; they are in the match's `unread`.
    """
    match = keymap.of(tensors).match(shapes, tensors, tied)
    if match.missing:
        name = keymap.source(match.missing[0]).names[0]
        close = nearest(name, match.unknown)
        raise MissingKeys(
            f"the checkpoint lacks {name}{_others(match.missing)}"
            + (f"; the nearest name in it is {close}" if close else "")
            + ": is it complete, and do its config and class match?"
        )
    if match.unknown:
        raise UnexpectedKeys(
            f"{tensors.path(match.unknown[0])} holds {match.unknown[0]}{_others(match.unknown)}, which is no "
            "parameter of this family"
        )
    if unread := [name for name in match.unread if not keymap.is_head(name)]:
        raise UnreadKeys(
            f"{tensors.path(unread[0])} holds {unread[0]}{_others(unread)}, which the config does not allow for: "
            "it describes a smaller or different model"
        )
    for canonical, source in match.sources.items():
        _check_shapes(tensors, source, canonical, shapes[canonical])
    return FileWeights(tensors, shapes, match.sources), match


def _check_shapes(tensors: Tensors, source: TensorSource, canonical: str, shape: Shape) -> None:
    for name, expected in zip(source.names, stored_shapes(source.op, shape), strict=True):
        if tensors.shape(name) != expected:
            raise ShapeMismatch(
                f"{name} ({canonical}) is {list(tensors.shape(name))} in {tensors.path(name).name}, but the config "
                f"implies {list(expected)}: do the config and the weights belong together?"
            )


def stored_shapes(op: Op, shape: Shape) -> list[Shape]:
    """The shapes of the stored tensors of a canonical parameter of this shape."""
    ghost = np.broadcast_to(np.False_, shape)  # no allocation, even for a shape from a malicious config
    return [_stored(view, len(shape)).shape for view in op.views(ghost)]


def _stored(view: Array, axes: int) -> Array:
    """A view with `axes` axes, as files store it: ops that split axis 0 in views leave it whole in the file."""
    return view if view.ndim == axes else view.reshape(-1, *view.shape[view.ndim - axes + 1 :])


def _is_same(op: Op, shape: Shape) -> bool:
    ghost = np.broadcast_to(np.False_, shape)
    return op.views(ghost)[0] is ghost


@dataclass(frozen=True)
class CastWeights:
    """Weights cast to the dtype `to`; tensors that are not floating-point stay as they are."""

    weights: CanonicalWeights
    to: str

    def shapes(self) -> Mapping[str, Shape]:
        return self.weights.shapes()

    def dtype(self, canonical: str) -> str:
        kind = self.weights.dtype(canonical)
        return self.to if kind in casts.FLOATS else kind

    def read(self, canonical: str) -> Array:
        return casts.cast(self.weights.read(canonical), self.to, canonical)


@dataclass(frozen=True)
class PooledKVWeights:
    """Weights whose key and value heads are means over equal groups of heads: MHA to GQA (arXiv:2305.13245)."""

    weights: CanonicalWeights
    spec: ArchSpec
    kv_heads: int

    def shapes(self) -> Mapping[str, Shape]:
        att = self.spec.attention
        rows = (att.heads + 2 * self.kv_heads) * att.head_dim
        return {
            name: (rows, *shape[1:]) if ".attn.qkv." in name else shape
            for name, shape in self.weights.shapes().items()
        }

    def dtype(self, canonical: str) -> str:
        return self.weights.dtype(canonical)

    def read(self, canonical: str) -> Array:
        """Rows of q, k, v; means are computed in float32 and rounded to the stored dtype."""
        array = self.weights.read(canonical)
        if ".attn.qkv." not in canonical:
            return array
        att = self.spec.attention
        rows = att.heads * att.head_dim
        groups = (2 * self.kv_heads, att.kv_heads // self.kv_heads, att.head_dim, *array.shape[1:])
        means = casts.widened(array[rows:]).reshape(groups).mean(axis=1).reshape(-1, *array.shape[1:])
        return np.concatenate([array[:rows], casts.cast(means, casts.dtype_of(array), canonical)])


def lazy_tensors(weights: CanonicalWeights, keymap: KeyMap) -> dict[str, LazyTensor]:
    """The tensors of a file under that key map, name -> tensor computed when it is written."""
    recent = _Recent(weights)
    made: dict[str, LazyTensor] = {}
    for canonical, shape in weights.shapes().items():
        source = keymap.source(canonical)
        reader = recent if len(source.names) > 1 else weights
        stored = stored_shapes(source.op, shape)
        for index, name in enumerate(source.names):
            make = _reader(reader, canonical, source.op, index)
            made[name] = LazyTensor(dtype=weights.dtype(canonical), shape=stored[index], make=make)
    return made


def _reader(weights: Any, canonical: str, op: Op, index: int) -> Callable[[], Array]:
    def make() -> Array:
        array = weights.read(canonical)
        return _stored(op.views(array)[index], array.ndim)

    return make


class _Recent:
    """Caches the last parameter read: the tensors that a fused parameter is split into are written consecutively."""

    def __init__(self, weights: CanonicalWeights):
        self._weights = weights
        self._name, self._array = "", None

    def read(self, canonical: str) -> Array:
        if canonical != self._name:
            self._name, self._array = "", None
            self._array = self._weights.read(canonical)
            self._name = canonical
        return self._array


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
