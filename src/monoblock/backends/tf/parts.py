"""Layers that hold others: built from a module tree, found by role.

Attributes and names are the tree's, which are those of transformers' old TF classes: variables have paths such as
`<model>/<prefix>/encoder/layer_._0/attention/attn/q/kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from monoblock import modules
from monoblock.backends.tf.layers import Conv1D, Leaves, NormLayer
from monoblock.backends.tf.ops import Tensor
from monoblock.spec import ArchSpec

PREFIX = "TF"
# What Keras's layers have under that name already -> the attribute in its place; the layer's own name stays.
TAKEN = {"output": "out"}


def attribute(name: str) -> str:
    """The attribute that holds the child of that name."""
    return TAKEN.get(name, name)


@functools.cache
def named(base: Any, name: str) -> Any:
    """The class under another name."""
    return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})


def plain(layer: Any) -> bool:
    """Whether a layer does what its `call` says and no more: built, of a class made here, without casts, penalties,
    quantisation or adapters."""
    kind = type(layer)
    if kind in (keras.layers.Dense, Conv1D):
        if (
            layer.lora_enabled
            or layer.activation is not keras.activations.linear
            or layer.quantization_mode is not None
            or "call" in vars(layer)
        ):
            return False
    elif not (isinstance(layer, Part | NormLayer) and kind.__call__ is keras.layers.Layer.__call__):
        return False
    same = layer.compute_dtype == layer.variable_dtype
    return layer.built and layer.activity_regularizer is None and same


def call(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What a layer gives. Eagerly, plain layers skip Keras's own work around a call, which takes longer than a small
    product does."""
    if tf.executing_eagerly() and plain(layer):
        return product(layer, *args) if isinstance(layer, keras.layers.Dense) else layer.call(*args, **kwargs)
    return layer(*args, **kwargs)


def product(layer: Any, x: Tensor) -> Tensor:
    """What a dense layer gives, (..., outputs)."""
    kernel = layer.kernel.value
    y = tf.matmul(tf.reshape(tf.cast(x, kernel.dtype), (-1, kernel.shape[0])), kernel)
    y = y if layer.bias is None else tf.nn.bias_add(y, tf.reshape(layer.bias.value, (-1,)))
    return tf.reshape(y, (*x.shape[:-1], kernel.shape[1]))


class Holder:
    """What holds layers. `roles`: role -> attribute name of the child that plays it; `shapes`: attribute name -> the
    shape that builds the child."""

    roles: dict[str, str]
    shapes: dict[str, Any]

    def role(self, role: str) -> Any:
        """The layer that plays a role now, whatever it was replaced by."""
        return getattr(self, self.roles[role])

    def call_role(self, role: str, /, *args: Any, **kwargs: Any) -> Any:
        """What the layer that plays a role gives."""
        return call(getattr(self, self.roles[role]), *args, **kwargs)

    def has(self, role: str) -> bool:
        """Whether a layer here plays that role."""
        return role in self.roles

    def build_children(self) -> None:
        """Make the weights of all layers below."""
        for name, shape in self.shapes.items():
            child = getattr(self, name)
            for layer in child if isinstance(child, list) else [child]:
                if not layer.built:
                    layer.build(shape)


class Part(Holder, keras.layers.Layer):
    """A layer that knows the shapes of its weights, and so needs no input to build them."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Note what this part computes."""

    def build(self, input_shape: Any = None) -> None:
        """Make the weights."""
        del input_shape
        self.make()
        self.build_children()

    def make(self) -> None:
        """Make the weights that are the part's own."""


@dataclass(frozen=True)
class Builder:
    """Makes the layers of a module tree: `kinds` are the classes of parts, `leaf` makes the layers without children."""

    spec: ArchSpec
    kinds: Mapping[str, type[Part]]
    leaf: Leaves
    names: modules.KerasNames

    def part(
        self, layout: modules.ModuleSpec, name: str, layer: int = 0, classes: Mapping[str, str] | None = None
    ) -> Part:
        """A part with all that is below it; `name` is the layer's."""
        kind: Any = self.kinds[layout.kind]
        made = named(kind, PREFIX + layout.name)(name=name, dtype=self.leaf.policy)
        self.fill(made, layout, layer, classes)
        made.prepare(self.spec, layer)
        return made

    def fill(
        self, made: Any, layout: modules.ModuleSpec, layer: int = 0, classes: Mapping[str, str] | None = None
    ) -> None:
        """Give a part its children, by the layout."""
        own = {**(classes or {}), **layout.classes}
        made.roles, made.shapes = {}, {}
        for name in self.ordered(layout.children):
            self.add(made, name, layout.children[name], own, layer)

    def add(
        self,
        made: Any,
        name: str,
        child: str | modules.ModuleSpec,
        classes: Mapping[str, str],
        layer: int = 0,
    ) -> None:
        """Give a part one child, if the model has it."""
        shape = None
        if isinstance(child, str):
            role, leaf = child, self.leaf(child, classes, name, layer)
            if leaf is None:
                return
            value, shape = leaf.layer, leaf.shape
        elif child.kind == "layer":
            names = [self.names.numbered.format(name=name, i=i) for i in range(self.spec.layers)]
            role, value = "layers", [self.part(child, own, i, classes) for i, own in enumerate(names)]
        else:
            role, value = child.kind, self.part(child, name, layer, classes)
        setattr(made, attribute(name), value)
        made.roles[role] = attribute(name)
        if isinstance(value, list | keras.layers.Layer):
            made.shapes[attribute(name)] = shape

    def ordered(self, children: Iterable[str]) -> list[str]:
        """Attribute names in the order in which they are made."""
        first = self.names.first
        return sorted(children, key=lambda name: first.index(name) if name in first else len(first))


def places(layout: modules.ModuleSpec) -> dict[str, tuple[str, ...]]:
    """Role or kind -> the path of names from the layout's own part."""
    return dict(layout.paths())


def at(owner: Any, path: Iterable[str], layer: int | None = None) -> Any:
    """What is at a path of names; "{i}" is the layer's number."""
    for step in path:
        owner = owner[layer] if step == "{i}" else getattr(owner, attribute(step))
    return owner


def layers_of(owner: Any, layout: modules.ModuleSpec, layers: int) -> Iterator[tuple[str, Any]]:
    """(dotted path of names, layer) of everything below a part that is there, in the order of the tree."""
    for path in layout.paths():
        steps = path[1]
        for i in range(layers) if "{i}" in steps else (0,):
            try:
                found = at(owner, steps, i)
            except AttributeError:
                continue
            if isinstance(found, keras.layers.Layer):
                yield ".".join(str(i) if step == "{i}" else step for step in steps), found
