"""Layers with sublayers, built from a module tree and looked up by role.

Attributes and names are those of transformers' TF classes: variables have paths such as
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
# A name that is an attribute of Keras's layers -> the attribute used instead; the layer's name is unchanged.
TAKEN = {"output": "out"}


def attribute(name: str) -> str:
    """The attribute of the sublayer with a name."""
    return TAKEN.get(name, name)


@functools.cache
def named(base: Any, name: str) -> Any:
    """A subclass with another name."""
    return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})


def is_plain(layer: Any) -> bool:
    """Whether `layer(x)` is equivalent to `layer.call(x)`: built, of a known class, without casts, regularisation,
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
    """Call a layer. In eager mode, plain layers bypass Keras's `__call__`, whose overhead exceeds the time of a small
    matrix product."""
    if tf.executing_eagerly() and is_plain(layer):
        return (
            dense_product(layer, *args)
            if isinstance(layer, keras.layers.Dense)
            else layer.call(*args, **kwargs)
        )
    return layer(*args, **kwargs)


def dense_product(layer: Any, x: Tensor) -> Tensor:
    """The output of a dense layer, (..., outputs)."""
    kernel = layer.kernel.value
    y = tf.matmul(tf.reshape(tf.cast(x, kernel.dtype), (-1, kernel.shape[0])), kernel)
    y = y if layer.bias is None else tf.nn.bias_add(y, tf.reshape(layer.bias.value, (-1,)))
    return tf.reshape(y, (*x.shape[:-1], kernel.shape[1]))


class Holder:
    """A container of layers. `roles`: role -> attribute name of the sublayer; `shapes`: attribute name -> the input
    shape that builds the sublayer."""

    roles: dict[str, str]
    shapes: dict[str, Any]

    def role(self, role: str) -> Any:
        """The current sublayer with a role, which may have been replaced."""
        return getattr(self, self.roles[role])

    def call_role(self, role: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call the sublayer with a role."""
        return call(getattr(self, self.roles[role]), *args, **kwargs)

    def has(self, role: str) -> bool:
        """Whether a sublayer has that role."""
        return role in self.roles

    def build_children(self) -> None:
        """Create the weights of all sublayers."""
        for name, shape in self.shapes.items():
            child = getattr(self, name)
            for layer in child if isinstance(child, list) else [child]:
                if not layer.built:
                    layer.build(shape)


class Part(Holder, keras.layers.Layer):
    """A layer with sublayers whose weights have known shapes, so that it is built without inputs."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Read the layer's configuration from the spec."""

    def build(self, input_shape: Any = None) -> None:
        """Create the weights."""
        del input_shape
        self.make()
        self.build_children()

    def make(self) -> None:
        """Create the weights of this layer itself."""


@dataclass(frozen=True)
class Builder:
    """Creates the layers of a module tree. `kinds`: the classes of module kinds; `leaf` creates layers without
    sublayers."""

    spec: ArchSpec
    kinds: Mapping[str, type[Part]]
    leaf: Leaves
    names: modules.KerasNames

    def part(
        self, layout: modules.ModuleSpec, name: str, layer: int = 0, classes: Mapping[str, str] | None = None
    ) -> Part:
        """Create a layer named `name` with its sublayers."""
        kind: Any = self.kinds[layout.kind]
        made = named(kind, PREFIX + layout.name)(name=name, dtype=self.leaf.policy)
        self.fill(made, layout, layer, classes)
        made.prepare(self.spec, layer)
        return made

    def fill(
        self, made: Any, layout: modules.ModuleSpec, layer: int = 0, classes: Mapping[str, str] | None = None
    ) -> None:
        """Add the sublayers of a layout to a layer."""
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
        """Add one sublayer to a layer, if the model has it."""
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
        """Attribute names in the order of creation."""
        first = self.names.first
        return sorted(children, key=lambda name: first.index(name) if name in first else len(first))


def role_paths(layout: modules.ModuleSpec) -> dict[str, tuple[str, ...]]:
    """Role or kind -> the path of attribute names in the layout."""
    return dict(layout.paths())


def at(owner: Any, path: Iterable[str], layer: int | None = None) -> Any:
    """The object at a path of names; "{i}" stands for the layer's index."""
    for step in path:
        owner = owner[layer] if step == "{i}" else getattr(owner, attribute(step))
    return owner


def layers_of(owner: Any, layout: modules.ModuleSpec, layers: int) -> Iterator[tuple[str, Any]]:
    """(dotted path of names, layer) of all existing sublayers, in the order of the tree."""
    for path in layout.paths():
        steps = path[1]
        for i in range(layers) if "{i}" in steps else (0,):
            try:
                found = at(owner, steps, i)
            except AttributeError:
                continue
            if isinstance(found, keras.layers.Layer):
                yield ".".join(str(i) if step == "{i}" else step for step in steps), found
