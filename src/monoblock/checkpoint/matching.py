"""Match a checkpoint's tensors with a model that may have another head, or another number of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from monoblock.checkpoint import quantized
from monoblock.checkpoint.keymap import KeyMap, KeyMatch, TensorSource, nearest
from monoblock.checkpoint.weights import FileWeights, Shape, Tensors, stored_shapes
from monoblock.errors import MissingKeys, ShapeMismatch, UnexpectedKeys, UnreadKeys


@dataclass
class LoadReport:
    """Outcome of a match, by name: parameters `missing` in the files or `mismatched` in shape (both are newly
    initialized); tensors `unused` as expected (other heads); and `extra` tensors ignored by `strict=False`."""

    missing: list[str] = field(default_factory=list[str])
    mismatched: list[str] = field(default_factory=list[str])
    unused: list[str] = field(default_factory=list[str])
    extra: list[str] = field(default_factory=list[str])

    @property
    def made(self) -> list[str]:
        """Canonical names of the parameters to initialize."""
        return [*self.missing, *self.mismatched]

    @property
    def unexpected(self) -> list[str]:
        """Names of all tensors that were not used, sorted."""
        return sorted({*self.unused, *self.extra})


def match_tensors(
    tensors: Tensors,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    tied: Iterable[str],
    *,
    ignore_mismatched_sizes: bool = False,
    ignored: Callable[[str], bool] | None = None,
    strict: bool = True,
) -> tuple[dict[str, TensorSource], LoadReport]:
    """Sources, by canonical name, of the parameters of these `shapes` that the files hold.

    A head may be missing. Heads of other kinds and names for which `ignored` is true are skipped; `strict=False` skips
    all other names as well. MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch (unless
    `ignore_mismatched_sizes`) name the first tensor that does not fit.
    """
    match = keymap.of(tensors).match(shapes, tensors, tied)
    unused = [name for name in match.unread if keymap.is_head(name)]
    if ignored is not None:
        unused += [name for name in (*match.unknown, *match.unread) if ignored(name)]
    known = frozenset(unused)
    unknown, unread = (
        [name for name in names if name not in known] for names in (match.unknown, match.unread)
    )
    _check_names(tensors, keymap, match, *((unknown, unread) if strict else ([], [])))
    report = LoadReport(
        missing=match.missing, unused=sorted(known), extra=[] if strict else [*unknown, *unread]
    )
    for canonical in match.sources:
        if problem := _misfit(tensors, match, canonical, shapes[canonical]):
            if not ignore_mismatched_sizes:
                raise ShapeMismatch(problem)
            report.mismatched.append(canonical)
    found = {name: source for name, source in match.sources.items() if name not in report.mismatched}
    return found, report


def match_weights(
    tensors: Tensors,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    tied: Iterable[str],
    *,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
) -> tuple[FileWeights, LoadReport]:
    """The sources of `match_tensors` as readable weights; same errors. CheckpointError: the weights are quantised."""
    quantized.refuse(tensors)
    sources, report = match_tensors(
        tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict
    )
    return FileWeights(tensors, {name: shapes[name] for name in sources}, sources), report


_LEAVE_OUT = "from_pretrained(..., strict=False) ignores"


def _check_names(
    tensors: Tensors, keymap: KeyMap, match: KeyMatch, unknown: list[str], unread: list[str]
) -> None:
    if needed := [name for name in match.missing if not name.startswith("head.")]:
        name = keymap.source(needed[0]).names[0]
        close = nearest(name, match.unknown)
        raise MissingKeys(
            f"the checkpoint lacks {name}{_others(needed)}"
            + (f"; the nearest name in it is {close}" if close else "")
            + ": is it complete, and of this model class?"
        )
    if unknown:
        name = unknown[0]
        close = nearest(name, (known for known in tensors if known not in match.unknown))
        raise UnexpectedKeys(
            f"{tensors.path(name).name} holds {name}{_others(unknown)}, which is no parameter of this family"
            + (f"; the nearest is {close}. " if close else ". ")
            + f"{_LEAVE_OUT} {_them(unknown)}"
        )
    if unread:
        raise UnreadKeys(
            f"{tensors.path(unread[0]).name} holds {unread[0]}{_others(unread)}, which the config does not allow for: "
            f"it describes a smaller or different model. {_LEAVE_OUT} {_them(unread)}"
        )


def _misfit(tensors: Tensors, match: KeyMatch, canonical: str, shape: Shape) -> str | None:
    """An error message if the stored tensors of a parameter have wrong shapes, else None."""
    source = match.sources[canonical]
    for name, expected in zip(source.names, stored_shapes(source.op, shape), strict=True):
        if (found := tensors.shape(name)) != expected:
            return (
                f"{name} ({canonical}) is {list(found)} in {tensors.path(name).name}, but the config implies "
                f"{list(expected)}: do config.json and the weights belong together?"
            )
    return None


def _them(names: list[str]) -> str:
    return "them" if len(names) > 1 else "it"


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
