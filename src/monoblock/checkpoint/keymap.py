"""The map between the hub's tensor names and the canonical parameter tree, as data that works both ways.

A row pairs one canonical parameter with its spellings in files. A spelling's `op` views the canonical tensor
as the tensors that the file holds; loading copies into those views, saving reads from them, so the two
directions cannot disagree. Ops only move bytes: there is no cast and no arithmetic.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol


class Op(Protocol):
    """How a file stores one canonical tensor; works on NumPy and PyTorch arrays alike."""

    def views(self, tensor: Any) -> tuple[Any, ...]:
        """The canonical tensor as views, one for each tensor of the file, in the order of the names."""
        ...


@dataclass(frozen=True)
class Same:
    """Stored as it is."""

    def views(self, tensor: Any) -> tuple[Any, ...]:
        return (tensor,)


@dataclass(frozen=True)
class Transposed:
    """Stored with its two axes swapped (GPT-1's Conv1D); a bias is stored as it is."""

    def views(self, tensor: Any) -> tuple[Any, ...]:
        return (tensor.swapaxes(0, 1) if tensor.ndim == 2 else tensor,)


@dataclass(frozen=True)
class Split:
    """Stored as several tensors of these many rows, which are consecutive here."""

    sizes: tuple[int, ...]

    def views(self, tensor: Any) -> tuple[Any, ...]:
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return tuple(tensor[end - size : end] for size, end in zip(self.sizes, ends, strict=True))


@dataclass(frozen=True)
class PerHead:
    """q, k and v are stored interleaved head by head, (heads, 3, head_dim), and here one after the other."""

    heads: int

    def views(self, tensor: Any) -> tuple[Any, ...]:
        head_dim = tensor.shape[0] // (3 * self.heads)
        return (tensor.reshape(3, self.heads, head_dim, *tensor.shape[1:]).swapaxes(0, 1),)


@dataclass(frozen=True)
class Interleaved:
    """Rotary channels are stored in neighbouring pairs, and here half a head apart: within each of `heads` heads,
    rows 0, 1, 2, 3, ... of the file are rows 0, d/2, 1, d/2 + 1, ... here."""

    heads: int

    def views(self, tensor: Any) -> tuple[Any, ...]:
        half = tensor.shape[0] // (2 * self.heads)
        return (tensor.reshape(self.heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2),)


@dataclass(frozen=True)
class SplitEach:
    """Stored as several tensors of these many rows, as `Split`, each then in its own way (an op of one tensor)."""

    sizes: tuple[int, ...]
    ops: tuple[Op, ...]

    def views(self, tensor: Any) -> tuple[Any, ...]:
        parts = Split(self.sizes).views(tensor)
        return tuple(op.views(part)[0] for op, part in zip(self.ops, parts, strict=True))


@dataclass(frozen=True)
class Spelling:
    """One way in which files name (and store) a parameter. `{i}` is a layer, `{p}` weight or bias."""

    names: tuple[str, ...]
    op: Op = field(default_factory=Same)


@dataclass(frozen=True)
class KeyRow:
    """A canonical parameter and its spellings; the first is the one that is written."""

    canonical: str
    spellings: tuple[Spelling, ...]


def row(canonical: str, *spellings: str | Spelling) -> KeyRow:
    """A row from plain names (stored as they are) and `Spelling`s."""
    return KeyRow(canonical, tuple(Spelling((s,)) if isinstance(s, str) else s for s in spellings))


@dataclass(frozen=True)
class TensorSource:
    """Where a canonical parameter comes from: the names in the file and the op that views it as them."""

    names: tuple[str, ...]
    op: Op


@dataclass
class KeyMatch:
    """What to read: sources by canonical name, what is not there, and what is there but not used."""

    sources: dict[str, TensorSource]
    missing: list[str]
    unread: list[str]
    unknown: list[str]


@dataclass(frozen=True)
class KeyMap:
    """A family's rows, for a bare model (`head=None`) or for a model with a head of that kind.

    `prefix` stands before the names of the bare model's parameters inside a model with a head; both forms are
    read. `heads` has the rows of each kind of head. `ignored` are regular expressions of names that hold no
    parameter (buffers of old files); `other_prefixes` are further prefixes met in files.
    """

    rows: tuple[KeyRow, ...]
    heads: Mapping[str, tuple[KeyRow, ...]]
    prefix: str
    head: str | None = None
    ignored: tuple[str, ...] = ()
    other_prefixes: tuple[str, ...] = ()

    @property
    def inside(self) -> bool:
        """Whether the bare model is a part of this one, and so its names carry the prefix. A pooler is its own."""
        return self.head not in (None, "pooler")

    def of(self, tensors: Any) -> KeyMap:
        """The map for these tensors. Flax's files have all matrices inputs x outputs, and give all of them outputs x
        inputs (`Store.outputs_first`), those too that the hub's files hold the other way round."""
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
        """The spelling under which a canonical parameter is written."""
        return self._candidates(canonical)[0]

    def match(self, parameters: Iterable[str], keys: Iterable[str], tied: Iterable[str] = ()) -> KeyMatch:
        """Match the parameters of a model with the keys of a file.

        `tied` names parameters that are another one's second name: their copies in a file are not needed.
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
        # Second names: of tied parameters, and further spellings of what was found (old files hold a bias twice).
        for canonical in (*tied, *sources):
            for source in self._candidates(canonical):
                left.difference_update(source.names)
        left = {key for key in left if not any(re.search(pattern, key) for pattern in self.ignored)}
        known = {key for key in left if self._is_known(key)}
        return KeyMatch(sources, missing, sorted(known), sorted(left - known))

    def is_head(self, key: str) -> bool:
        """Whether a name of a file belongs to a head of this family, of whatever kind."""
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
    """The name most like this one, if any is alike."""
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
