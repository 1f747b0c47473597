"""A checkpoint's weights by canonical name, wherever they come from, and laid out again for another file.

All in NumPy, one tensor at a time: nothing is read before it is asked for, and nothing asked for is kept.
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
    """Tensors by the names of some file; a `Store` is one."""

    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> Shape: ...
    def dtype(self, name: str) -> str: ...
    def path(self, name: str) -> Path: ...
    def tensor(self, name: str) -> Array: ...


class CanonicalWeights(Protocol):
    """Weights by canonical name."""

    def shapes(self) -> Mapping[str, Shape]: ...
    def dtype(self, canonical: str) -> str: ...
    def read(self, canonical: str) -> Array: ...


class StateTensors:
    """Tensors that a caller has in memory, by name, of any framework."""

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
    """Tensors under other names, new name -> old name; those not listed are left out."""

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
        """See `Store.concatenated`; None where the tensors are no store's."""
        join = getattr(self._tensors, "concatenated", None)
        return join([self._names[name] for name in names]) if join else None


class ConcatenatedTensors:
    """Files of which each holds one part of every tensor, along the axis in which the parts' sizes add up to the
    `expected` size; a tensor that has its expected shape in each file is the same in all."""

    def __init__(self, parts: Sequence[Tensors], expected: Mapping[str, Shape]):
        self._parts = parts
        self._expected = expected

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def shape(self, name: str) -> Shape:
        return self._parts[0].shape(name) if self._axis(name) is None else self._expected[name]

    def dtype(self, name: str) -> str:
        return self._parts[0].dtype(name)

    def path(self, name: str) -> Path:
        return self._parts[0].path(name)

    def tensor(self, name: str) -> Array:
        axis = self._axis(name)
        arrays = [part.tensor(name) for part in (self._parts[:1] if axis is None else self._parts)]
        return arrays[0] if axis is None else np.concatenate(arrays, axis)

    def _axis(self, name: str) -> int | None:
        """Where the parts join; None: each file holds the whole (or what does not fit, which is refused later)."""
        whole, found = self._expected.get(name), [part.shape(name) for part in self._parts]
        if whole is None or len(whole) != len(found[0]):
            return None
        for axis, size in enumerate(whole):
            rest = {shape[:axis] + shape[axis + 1 :] for shape in found}
            sizes = sum(shape[axis] for shape in found)
            if sizes == size and rest == {whole[:axis] + whole[axis + 1 :]}:
                return axis
        return None


class FileWeights:
    """The weights that a key map finds in tensors; made by `open_weights`, which checks that they fit."""

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
        """A parameter as the tensors that `op` views it as; where the files hold just these, each as it is there."""
        source = self._sources[canonical]
        if source.op == op:
            return [self._tensors.tensor(name) for name in source.names]
        whole = self.read(canonical)
        return [_stored(view, whole.ndim) for view in op.views(whole)]


def open_weights(
    tensors: Tensors, keymap: KeyMap, shapes: Mapping[str, Shape], tied: Iterable[str]
) -> tuple[FileWeights, KeyMatch]:
    """The weights of a model with parameters of these `shapes`, and what was found.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit. A head
    that the model does not have is no error: its tensors are in the plan's `unread`.
    """
    plan = keymap.of(tensors).match(shapes, tensors, tied)
    if plan.missing:
        name = keymap.source(plan.missing[0]).names[0]
        close = nearest(name, plan.unknown)
        raise MissingKeys(
            f"the checkpoint lacks {name}{_others(plan.missing)}"
            + (f"; the nearest name in it is {close}" if close else "")
            + ": is it complete, and of the format and class that its config says?"
        )
    if plan.unknown:
        raise UnexpectedKeys(
            f"{tensors.path(plan.unknown[0])} holds {plan.unknown[0]}{_others(plan.unknown)}, which is no name of "
            "this family"
        )
    if unread := [name for name in plan.unread if not keymap.is_head(name)]:
        raise UnreadKeys(
            f"{tensors.path(unread[0])} holds {unread[0]}{_others(unread)}, for which the config has no place: it "
            "describes a smaller or differently built model"
        )
    for canonical, source in plan.sources.items():
        _check_shapes(tensors, source, canonical, shapes[canonical])
    return FileWeights(tensors, shapes, plan.sources), plan


def _check_shapes(tensors: Tensors, source: TensorSource, canonical: str, shape: Shape) -> None:
    for name, expected in zip(source.names, stored_shapes(source.op, shape), strict=True):
        if tensors.shape(name) != expected:
            raise ShapeMismatch(
                f"{name} ({canonical}) is {list(tensors.shape(name))} in {tensors.path(name).name}, but the config "
                f"implies {list(expected)}: do the config and the weights belong together?"
            )


def stored_shapes(op: Op, shape: Shape) -> list[Shape]:
    """The shapes of the tensors that a file holds for a canonical parameter of that shape."""
    ghost = np.broadcast_to(np.False_, shape)  # one byte, whatever a config says of the shape
    return [_stored(view, len(shape)).shape for view in op.views(ghost)]


def _stored(view: Array, axes: int) -> Array:
    """A view as the file's tensor: an op that splits the first axis into several does not change what is stored."""
    return view if view.ndim == axes else view.reshape(-1, *view.shape[view.ndim - axes + 1 :])


def _is_same(op: Op, shape: Shape) -> bool:
    ghost = np.broadcast_to(np.False_, shape)
    return op.views(ghost)[0] is ghost


@dataclass(frozen=True)
class CastWeights:
    """Weights in another floating-point type; other tensors stay."""

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
    """Weights whose key and value heads are the means of equal groups of the given ones (arXiv:2305.13245)."""

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
        """(q | k | v) rows; the mean is taken in float32 and rounded to the weights' own type."""
        array = self.weights.read(canonical)
        if ".attn.qkv." not in canonical:
            return array
        att = self.spec.attention
        rows = att.heads * att.head_dim
        groups = (2 * self.kv_heads, att.kv_heads // self.kv_heads, att.head_dim, *array.shape[1:])
        means = casts.widened(array[rows:]).reshape(groups).mean(axis=1).reshape(-1, *array.shape[1:])
        return np.concatenate([array[:rows], casts.cast(means, casts.dtype_of(array), canonical)])


def lazy_tensors(weights: CanonicalWeights, keymap: KeyMap) -> dict[str, LazyTensor]:
    """What a file by that key map holds: its names, and each tensor as it is made when its turn comes."""
    recent = _Recent(weights)
    made: dict[str, LazyTensor] = {}
    for canonical, shape in weights.shapes().items():
        source = keymap.source(canonical)
        reader = recent if len(source.names) > 1 else weights
        stored = stored_shapes(source.op, shape)
        for place, name in enumerate(source.names):
            make = _maker(reader, canonical, source.op, place)
            made[name] = LazyTensor(dtype=weights.dtype(canonical), shape=stored[place], make=make)
    return made


def _maker(weights: Any, canonical: str, op: Op, place: int) -> Callable[[], Array]:
    def make() -> Array:
        array = weights.read(canonical)
        return _stored(op.views(array)[place], array.ndim)

    return make


class _Recent:
    """Keeps the last parameter that was read: the parts of a fused one are written one after the other."""

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
