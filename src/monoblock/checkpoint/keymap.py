"""The key map: checkpoint tensor names to canonical parameter names, as a table used for loading and for saving.

A row pairs one canonical parameter with its spellings: the names under which files store it, and an `op` that views
the canonical tensor as the stored tensors. Loading copies into those views and saving reads from them, so one table
serves both directions. Ops only rearrange elements: there is no cast and no arithmetic.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol


class Op(Protocol):
    """The layout in which a file stores one canonical tensor. Accepts NumPy and PyTorch arrays."""

    def views(self, tensor: Any) -> tuple[Any, ...]:
        """Views of the canonical tensor, one per stored tensor, in the order of the names."""
        ...


@dataclass(frozen=True)
class Same:
    """Stored unchanged."""

    def views(self, tensor: Any) -> tuple[Any, ...]:
        return (tensor,)


@dataclass(frozen=True)
class Transposed:
    """A matrix stored transposed, (inputs, outputs), as GPT-1's Conv1D has it; a bias is stored unchanged."""

    def views(self, tensor: Any) -> tuple[Any, ...]:
        return (tensor.swapaxes(0, 1) if tensor.ndim == 2 else tensor,)


@dataclass(frozen=True)
class Split:
    """Stored as several tensors of `sizes` rows; the canonical tensor is their concatenation along axis 0."""

    sizes: tuple[int, ...]

    def views(self, tensor: Any) -> tuple[Any, ...]:
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return tuple(tensor[end - size : end] for size, end in zip(self.sizes, ends, strict=True))


@dataclass(frozen=True)
class PerHead:
    """Fused q, k, v stored interleaved by head, (heads, 3, head_dim, ...); canonical is (3, heads, head_dim, ...)."""

    heads: int

    def views(self, tensor: Any) -> tuple[Any, ...]:
        head_dim = tensor.shape[0] // (3 * self.heads)
        return (tensor.reshape(3, self.heads, head_dim, *tensor.shape[1:]).swapaxes(0, 1),)


@dataclass(frozen=True)
class Interleaved:
    """RoPE channel pairs stored interleaved (GPT-J style); canonical pairs are d/2 apart (NeoX style). In each head,
    rows 0, 1, 2, 3, ... of the file are rows 0, d/2, 1, d/2 + 1, ... of the canonical tensor."""

    heads: int

    def views(self, tensor: Any) -> tuple[Any, ...]:
        half = tensor.shape[0] // (2 * self.heads)
        return (tensor.reshape(self.heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2),)


@dataclass(frozen=True)
class SplitEach:
    """Stored as several tensors of `sizes` rows, as by `Split`, each through an op of its own (one tensor per op)."""

    sizes: tuple[int, ...]
    ops: tuple[Op, ...]

    def views(self, tensor: Any) -> tuple[Any, ...]:
        chunks = Split(self.sizes).views(tensor)
        return tuple(op.views(chunk)[0] for op, chunk in zip(self.ops, chunks, strict=True))


@dataclass(frozen=True)
class Spelling:
    """The tensor names and the layout under which some files store a parameter; `{i}` is the layer index, `{p}` is
    "weight" or "bias"."""

    names: tuple[str, ...]
    op: Op = field(default_factory=Same)


@dataclass(frozen=True)
class KeyRow:
    """A canonical parameter and its spellings. All are read; the first is written."""

    canonical: str
    spellings: tuple[Spelling, ...]


def row(canonical: str, *spellings: str | Spelling) -> KeyRow:
    """A row from names (tensors stored unchanged) and `Spelling`s."""
    return KeyRow(canonical, tuple(Spelling((s,)) if isinstance(s, str) else s for s in spellings))


@dataclass(frozen=True)
class TensorSource:
    """The stored tensors of one canonical parameter: their names, and the op that views the parameter as them."""

    names: tuple[str, ...]
    op: Op


@dataclass
class KeyMatch:
    """The result of matching a model's parameters with a file's names: sources by canonical name, `missing` parameters,
    and unused names, either `unread` (names of this family) or `unknown`."""

    sources: dict[str, TensorSource]
    missing: list[str]
    unread: list[str]
    unknown: list[str]


@dataclass(frozen=True)
class KeyMap:
    """The rows of a family, for a bare model (`head=None`) or for a model with a head of kind `head`.

    `prefix` precedes the names of the bare model's parameters in a model with a head; names with and without it are
    read. `heads` holds the rows of each kind of head. `ignored` lists regular expressions of names that are no
    parameters (buffers in old files); `other_prefixes` lists further prefixes that files use.
    """

    rows: tuple[KeyRow, ...]
    heads: Mapping[str, tuple[KeyRow, ...]]
    prefix: str
    head: str | None = None
    ignored: tuple[str, ...] = ()
    other_prefixes: tuple[str, ...] = ()

    @property
    def inside(self) -> bool:
        """Whether the bare model is a submodule, so that its names carry the prefix (a pooler belongs to the bare
        model)."""
        return self.head not in (None, "pooler")

    def of(self, tensors: Any) -> KeyMap:
        """The map for `tensors`. A store of Flax files returns every matrix as (outputs, inputs), including those that
        PyTorch files store transposed (`Store.outputs_first`); for it, no op transposes."""
        if not getattr(tensors, "outputs_first", False):
            return self

        def same(known: KeyRow) -> KeyRow:
            return replace(
                known,
                spellings=tuple(
                    replace(s, op=Same()) if s.op == Transposed() else s for s in known.spellings
                ),
            )

        return replace(self, rows=tuple(same(known) for known in self.rows))

    def source(self, canonical: str) -> TensorSource:
        """The names and the op under which a canonical parameter is written."""
        return self._candidates(canonical)[0]

    def match(self, parameters: Iterable[str], keys: Iterable[str], tied: Iterable[str] = ()) -> KeyMatch:
        """Match a model's parameters with the tensor names of a file.

        `tied` lists parameters that share another parameter's tensor; their copies in a file are not needed.
        """
        left = set(keys)
        sources: dict[str, TensorSource] = {}
        missing: list[str] = []
        for canonical in parameters:
            found = next((s for s in self._candidates(canonical) if all(n in left for n in s.names)), None)
            if found is None:
                missing.append(canonical)
            else:
                sources[canonical] = found
                left.difference_update(found.names)
        # Duplicates: tied parameters, and other spellings of matched ones (old files hold a bias under two names).
        for canonical in (*tied, *sources):
            for source in self._candidates(canonical):
                left.difference_update(source.names)
        left = {key for key in left if not any(re.search(pattern, key) for pattern in self.ignored)}
        known = {key for key in left if self._is_known(key)}
        return KeyMatch(sources, missing, sorted(known), sorted(left - known))

    def is_head(self, key: str) -> bool:
        """Whether a tensor name belongs to any kind of head of this family."""
        return any(_matches(row, key, "") for rows in self.heads.values() for row in rows)

    def _candidates(self, canonical: str) -> list[TensorSource]:
        if canonical.startswith("head."):
            return _spelled(self.heads[self.head or ""], canonical, ("",))
        first, second = (self.prefix, "") if self.inside else ("", self.prefix)
        return _spelled(self.rows, canonical, (first, second, *self.other_prefixes))

    def _is_known(self, key: str) -> bool:
        prefixes = ("", self.prefix, *self.other_prefixes)
        return self.is_head(key) or any(
            _matches(row, key, prefix) for row in self.rows for prefix in prefixes
        )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name (difflib ratio of at least 0.6), if any."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def _spelled(rows: Iterable[KeyRow], canonical: str, prefixes: tuple[str, ...]) -> list[TensorSource]:
    for candidate in rows:
        if match := _pattern(candidate.canonical).fullmatch(canonical):
            values = match.groupdict()
            return [
                TensorSource(tuple(prefix + _filled(name, values) for name in spelling.names), spelling.op)
                for spelling in candidate.spellings
                for prefix in prefixes
            ]
    raise KeyError(f"the key map has no row for {canonical!r}")


def _matches(candidate: KeyRow, key: str, prefix: str) -> bool:
    names = (name for spelling in candidate.spellings for name in spelling.names)
    return key.startswith(prefix) and any(
        _pattern(name).fullmatch(key.removeprefix(prefix)) for name in names
    )


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)"))


def _filled(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template
