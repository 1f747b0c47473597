"""A checkpoint's weights for a model that may have other heads, or labels, than the one that was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from monoblock.checkpoint import quantized
from monoblock.checkpoint.keymap import KeyMap, KeyMatch, TensorSource, nearest
from monoblock.checkpoint.weights import FileWeights, Shape, Tensors, stored_shapes
from monoblock.errors import MissingKeys, ShapeMismatch, UnexpectedKeys, UnreadKeys


@dataclass
class LoadReport:
    """What the files lack or have in another shape (both are to be made anew); what was not used of them, as is usual;
    and what was passed over because the load was not strict."""

    missing: list[str] = field(default_factory=list[str])
    mismatched: list[str] = field(default_factory=list[str])
    unused: list[str] = field(default_factory=list[str])
    extra: list[str] = field(default_factory=list[str])

    @property
    def made(self) -> list[str]:
        """The canonical names of what must be made anew."""
        return [*self.missing, *self.mismatched]

    @property
    def unexpected(self) -> list[str]:
        """The names of all tensors that were not used, in order."""
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
    """Where a model with parameters of these `shapes` finds them, as far as the files have them: by canonical name.

    A head may be missing, and heads of other kinds may be there, and names that are `ignored`; with `strict=False` any
    others too. MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch (unless sizes may differ) name the first
    tensor that does not fit.
    """
    plan = keymap.of(tensors).match(shapes, tensors, tied)
    unused = [name for name in plan.unread if keymap.is_head(name)]
    if ignored is not None:
        unused += [name for name in (*plan.unknown, *plan.unread) if ignored(name)]
    known = frozenset(unused)
    unknown, unread = ([name for name in names if name not in known] for names in (plan.unknown, plan.unread))
    _check_names(tensors, keymap, plan, *((unknown, unread) if strict else ([], [])))
    report = LoadReport(
        missing=plan.missing, unused=sorted(known), extra=[] if strict else [*unknown, *unread]
    )
    for canonical in plan.sources:
        if problem := _misfit(tensors, plan, canonical, shapes[canonical]):
            if not ignore_mismatched_sizes:
                raise ShapeMismatch(problem)
            report.mismatched.append(canonical)
    found = {name: source for name, source in plan.sources.items() if name not in report.mismatched}
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
    """What `match_tensors` finds, as weights to read; the same errors. CheckpointError: the weights are packed."""
    quantized.refuse(tensors)
    sources, report = match_tensors(
        tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict
    )
    return FileWeights(tensors, {name: shapes[name] for name in sources}, sources), report


_LEAVE_OUT = "from_pretrained(..., strict=False) loads the rest without"


def _check_names(
    tensors: Tensors, keymap: KeyMap, plan: KeyMatch, unknown: list[str], unread: list[str]
) -> None:
    if needed := [name for name in plan.missing if not name.startswith("head.")]:
        name = keymap.source(needed[0]).names[0]
        close = nearest(name, plan.unknown)
        raise MissingKeys(
            f"the checkpoint lacks {name}{_others(needed)}"
            + (f"; the nearest name in it is {close}" if close else "")
            + ": is it of this model class, and complete?"
        )
    if unknown:
        name = unknown[0]
        close = nearest(name, (known for known in tensors if known not in plan.unknown))
        raise UnexpectedKeys(
            f"{tensors.path(name).name} holds {name}{_others(unknown)}, which is no name of this family"
            + (f"; the nearest is {close}. " if close else ". ")
            + f"{_LEAVE_OUT} {_them(unknown)}"
        )
    if unread:
        raise UnreadKeys(
            f"{tensors.path(unread[0]).name} holds {unread[0]}{_others(unread)}, for which the config has no place: "
            f"it describes a smaller or differently built model. {_LEAVE_OUT} {_them(unread)}"
        )


def _misfit(tensors: Tensors, plan: KeyMatch, canonical: str, shape: Shape) -> str | None:
    """What is wrong with the shapes of a parameter's tensors in the files, if anything."""
    source = plan.sources[canonical]
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
