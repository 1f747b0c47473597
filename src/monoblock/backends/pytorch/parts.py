"""Modules that hold others: built from a module tree, found by role, with matrices side by side in memory.

Kernels want some matrices as one (q, k and v; gate and up). They are separate modules here, whose tensors lie one after
the other in one allocation; `Part.fused` gives them as one where they still do. Each tensor has a storage of its own,
since tools take tensors that share a storage for one and the same, and drop all but the first when they save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from monoblock import modules as tree
from monoblock.backends.pytorch.kernels import dispatch, low_rank
from monoblock.spec import ArchSpec

GROUPS = tuple(tree.GROUPS)
TENSORS = ("weight", "bias", "codes", "scale", "low")


@functools.cache
def named(base: type[nn.Module], name: str) -> Any:
    """The class under another name: what tools find by class name has transformers' names."""
    if base.__name__ == name:
        return base
    return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, "named_from": base})


def _blank(base: type[nn.Module], name: str) -> nn.Module:
    made = named(base, name)
    return made.__new__(made)


class Named(nn.Module):
    """A module whose class may have been made by `named`, which pickle cannot import by its name."""

    named_from: type[nn.Module] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = type(self)
        if made.__dict__.get("named_from") is None:
            return super().__reduce_ex__(protocol)
        return _blank, (made.named_from, made.__name__), self.__getstate__()

    def __getstate__(self) -> Any:
        return self.__dict__.copy()


class Part(Named):
    """A module that holds others. `roles`: role -> attribute name of the child that plays it."""

    roles: dict[str, str]
    fused_tensors: dict[str, dict[str, Tensor]]
    tuples: bool

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Note what this part computes."""

    def role(self, role: str) -> Any:
        """The module that plays a role now, whatever it was replaced by."""
        return getattr(self, self.roles[role])

    def has(self, role: str) -> bool:
        """Whether a module here plays that role."""
        return role in self.roles

    def fused(self, group: tuple[str, ...]) -> dict[str, Tensor] | None:
        """The tensors of a group's modules, each kind as one; None if any module must be called for itself."""
        held = self.fused_tensors.get(group[0])
        if held is None or self.fusion_obstacle(group) is not None:
            return None
        return held

    def fusion_obstacle(self, group: tuple[str, ...], *, adapted: bool = False) -> str | None:
        """Why a group's modules must be called one by one; None if they need not. `adapted`: whether the matrices below
        LoRA adapters are meant, whose terms the caller adds."""
        held = self.fused_tensors.get(group[0])
        if held is None:
            return f"{', '.join(self.roles[role] for role in group)} do not lie side by side"
        place = {name: whole.data_ptr() for name, whole in held.items()}
        first = None
        for role in group:
            module = self.role(role)
            if adapted:
                module = low_rank.base(module)
            if (why := dispatch.altered(module)) is not None:
                return f"{why} on {self.roles[role]}"
            kind = type(module)
            if (kind is not nn.Linear and "fusible" not in vars(kind)) or kind is not type(first or module):
                return f"{self.roles[role]} is a {kind.__module__}.{kind.__name__}"
            first = module
            for name in TENSORS:
                tensor = _tensor(module, name)
                if (tensor is None) != (name not in held):
                    return f"{self.roles[role]} has another {name}"
                if tensor is None:
                    continue
                whole = held[name]
                if (
                    tensor.data_ptr() != place[name]
                    or tensor.dtype != whole.dtype
                    or tensor.shape[1:] != whole.shape[1:]
                    or type(tensor) not in dispatch.ORDINARY
                ):
                    self.fused_tensors.pop(group[0])
                    return f"{self.roles[role]}.{name} does not lie beside the others"
                place[name] += tensor.numel() * tensor.element_size()
        return None

    def fuse_groups(self) -> None:
        """Put the tensors of each group side by side, where they are not."""
        for group in GROUPS:
            if all(role in self.roles for role in group):
                fuse_group(self, group)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.fuse_groups()
        return self

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "fused_tensors": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fuse_groups()


def fuse_weights(modules: Iterable[nn.Module]) -> None:
    """Put the matrices that kernels want as one side by side, in all parts among the modules."""
    for module in modules:
        if isinstance(module, Part):
            module.fuse_groups()


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def fuse_group(part: Part, group: tuple[str, ...]) -> None:
    """Put the tensors of a group's modules side by side in one allocation for each kind, and remember it; nothing is
    done where they are of different kinds, on the meta device, or not ordinary tensors."""
    if part.fused_tensors.get(group[0]) is not None and part.fusion_obstacle(group, adapted=True) is None:
        return
    part.fused_tensors.pop(group[0], None)
    found = [low_rank.base(part.role(role)) for role in group]
    if any(type(module) is not type(found[0]) for module in found):
        return
    wholes: dict[str, Tensor] = {}
    for name in TENSORS:
        tensors = [_tensor(module, name) for module in found]
        given = [tensor for tensor in tensors if tensor is not None]
        if not given:
            continue
        if len(given) != len(tensors) or not _alike(given):
            return
        wholes[name] = _whole([tensor.detach() for tensor in given])
    for name, whole in wholes.items():
        for module, view in zip(found, views(whole, [_rows(module, name) for module in found]), strict=True):
            if name in module._buffers:
                module._buffers[name] = view
            else:
                module._parameters[name].data = view
    if wholes:
        part.fused_tensors[group[0]] = wholes


def _rows(module: nn.Module, name: str) -> int:
    tensor = _tensor(module, name)
    assert tensor is not None
    return tensor.shape[0]


def _alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return all(
        type(x) in dispatch.ORDINARY
        and x.layout == torch.strided
        and x.device == first.device
        and x.device.type != "meta"
        and x.dtype == first.dtype
        and x.shape[1:] == first.shape[1:]
        and x.is_contiguous()
        and (torch.is_inference_mode_enabled() or not x.is_inference())
        for x in tensors
    )


def _whole(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of these rows: where they lie side by side already as views of one, that memory; else a new one."""
    base = tensors[0]._base if tensors[0]._base is not None else None
    if base is not None and all(x._base is base for x in tensors) and _adjacent(tensors):
        rows = sum(x.shape[0] for x in tensors)
        return base.as_strided(
            (rows, *tensors[0].shape[1:]), tensors[0].stride(), tensors[0].storage_offset()
        )
    return torch.cat(tuple(tensors))


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    ends = [x.data_ptr() + x.numel() * x.element_size() for x in tensors]
    return all(x.data_ptr() == end for x, end in zip(tensors[1:], ends, strict=False))


def views(whole: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """The rows of a whole, each tensor with a storage of its own over the same memory."""
    return [torch.from_dlpack(view) for view in whole.split(list(rows))]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put the module in the place of that name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


class Builder:
    """Makes the modules of a layout: of `layers` blocks, each part of the class that its kind has in `kinds`.

    `leaf(role, classes)` makes the module of a role, or None where the model has none of it; `prepare(part,
    layer)` tells a part what it is to compute.
    """

    def __init__(
        self,
        kinds: Mapping[str, type[Part]],
        leaf: Callable[[str, Mapping[str, str]], nn.Module | None],
        prepare: Callable[[Part, int], None],
        layers: int,
    ) -> None:
        self.kinds, self.leaf, self.prepare, self.layers = kinds, leaf, prepare, layers

    def build(self, layout: tree.ModuleSpec, classes: Mapping[str, str], layer: int = 0) -> Part:
        """The part of a layout with all that is below it. `classes`: those of roles, as the parts around it say."""
        made = named(self.kinds[layout.kind], layout.name)()
        self.fill(made, layout, classes, layer)
        self.prepare(made, layer)
        return made

    def fill(
        self, made: Part, layout: tree.ModuleSpec, classes: Mapping[str, str] | None = None, layer: int = 0
    ) -> None:
        """Give a part its children, by the layout."""
        classes = {**(classes or {}), **layout.classes}
        made.fused_tensors = {}
        made.roles = {} if "roles" not in vars(made) else made.roles
        made.tuples = layout.tuples
        for name, child in layout.children.items():
            if isinstance(child, str):
                module, role = self.leaf(child, classes), child
            elif child.kind == "layer":
                blocks = [self.build(child, classes, i) for i in range(self.layers)]
                module, role = nn.ModuleList(blocks), "layers"
            else:
                module, role = self.build(child, classes, layer), child.kind
            if module is not None:
                made.add_module(name, module)
                made.roles[role] = name
