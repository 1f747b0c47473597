"""Modules with submodules: built from a module tree, found by role, with fused weights.

Some matrices (q, k and v; gate and up) are multiplied as one. They are separate modules whose tensors are adjacent in
one allocation; `Part.fused` returns the fused tensors as long as they are. Each tensor has a separate storage object,
since tools treat tensors of one storage as shared weights, and save only the first.
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
    """The class under another name: tools look up modules by transformers' class names."""
    if base.__name__ == name:
        return base
    return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, "named_from": base})


def _blank(base: type[nn.Module], name: str) -> nn.Module:
    made = named(base, name)
    return made.__new__(made)


class Named(nn.Module):
    """A module whose class may have been created by `named`, which pickle cannot import by name."""

    named_from: type[nn.Module] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = type(self)
        if made.__dict__.get("named_from") is None:
            return super().__reduce_ex__(protocol)
        return _blank, (made.named_from, made.__name__), self.__getstate__()

    def __getstate__(self) -> Any:
        return self.__dict__.copy()


class Part(Named):
    """A module with submodules. `roles`: role -> attribute name of the submodule."""

    roles: dict[str, str]
    fused_tensors: dict[str, dict[str, Tensor]]
    tuples: bool

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Read this part's options from the spec."""

    def role(self, role: str) -> Any:
        """The submodule of a role, looked up at each call, so that replacements take effect."""
        return getattr(self, self.roles[role])

    def has(self, role: str) -> bool:
        """Whether this part has a submodule of that role."""
        return role in self.roles

    def fused(self, group: tuple[str, ...]) -> dict[str, Tensor] | None:
        """The fused tensors of a group by kind ("weight", "bias", ..); None if its modules must be called one by
        one."""
        held = self.fused_tensors.get(group[0])
        if held is None or self.fusion_obstacle(group) is not None:
            return None
        return held

    def fusion_obstacle(self, group: tuple[str, ...], *, adapted: bool = False) -> str | None:
        """Why a group's modules must be called one by one; None if they can be fused. `adapted`: check the matrices
        inside LoRA layers, whose low-rank terms the caller adds."""
        held = self.fused_tensors.get(group[0])
        if held is None:
            return f"{', '.join(self.roles[role] for role in group)} are not adjacent in memory"
        address = {name: whole.data_ptr() for name, whole in held.items()}
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
                    tensor.data_ptr() != address[name]
                    or tensor.dtype != whole.dtype
                    or tensor.shape[1:] != whole.shape[1:]
                    or type(tensor) not in dispatch.ORDINARY
                ):
                    self.fused_tensors.pop(group[0])
                    return f"{self.roles[role]}.{name} is not adjacent to the others"
                address[name] += tensor.numel() * tensor.element_size()
        return None

    def fuse_groups(self) -> None:
        """Make the tensors of each group adjacent in memory."""
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
    """Make the tensors of each group adjacent in memory, in all parts among the modules."""
    for module in modules:
        if isinstance(module, Part):
            module.fuse_groups()


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def fuse_group(part: Part, group: tuple[str, ...]) -> None:
    """Move the tensors of a group's modules into one allocation per kind, and record the fused tensors. Does nothing if
    they differ in type or dtype, are on the meta device, or are tensor subclasses."""
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
    """One tensor of all rows: without a copy if they are adjacent views of one tensor, else concatenated."""
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
    """Split a tensor by rows, each result with a separate storage object over the same memory."""
    return [torch.from_dlpack(view) for view in whole.split(list(rows))]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of that name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


class Builder:
    """Builds the modules of a layout with `layers` blocks; `kinds`: kind of part -> class.

    `leaf(role, classes)` creates the module of a role, or None if the model has none; `prepare(part, layer)` sets a
    part's options.
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
        """The part of a layout with all its descendants. `classes`: role -> class name, from the enclosing parts."""
        made = named(self.kinds[layout.kind], layout.name)()
        self.fill(made, layout, classes, layer)
        self.prepare(made, layer)
        return made

    def fill(
        self, made: Part, layout: tree.ModuleSpec, classes: Mapping[str, str] | None = None, layer: int = 0
    ) -> None:
        """Add a part's submodules, according to the layout."""
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
