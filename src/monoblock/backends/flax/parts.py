"""Linen modules with submodules, built from a module tree and looked up by role.

The tree's attribute names are the names of the modules and in the paths of their parameters: `h`, `"0"`, `attn`,
`q_proj`. A list of layers is a module with one submodule per index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from monoblock import modules as tree
from monoblock.backends.flax.layers import leaf
from monoblock.heads import HeadSpec
from monoblock.spec import ArchSpec

# Kind of a module in a module tree -> its class; registered by `computes`.
KINDS: dict[str, type[Part]] = {}
T = TypeVar("T", bound=type)


def computes(kind: str) -> Callable[[T], T]:
    """Register a class for a kind of modules."""

    def register(cls: T) -> T:
        KINDS[kind] = cls
        return cls

    return register


class _Node(nn.Module):
    """The fields that modules and the list of layers share. `index`: the index of the enclosing layer; `remat`:
    gradient checkpointing."""

    layout: tree.ModuleSpec
    spec: ArchSpec
    head_spec: HeadSpec | None = None
    dtype: Any = jnp.float32
    remat: bool = False
    index: int = 0


class Part(_Node):
    """A module with submodules."""

    def setup(self) -> None:
        roles: dict[str, str] = {}
        for name, child in self.layout.children.items():
            module = self.make(child)
            if module is not None:
                setattr(self, name, module)
                roles[child if isinstance(child, str) else _role(child)] = name
        self.roles = roles

    @nn.nowrap
    def make(self, child: str | tree.ModuleSpec) -> nn.Module | None:
        """Create a submodule; None if it has no parameters and no computation."""
        if isinstance(child, str):
            return leaf(child, self.spec, self.head_spec, self.layout.classes, self.dtype)
        child = tree.with_outer_classes(child, self.layout)
        kind = Layers if child.kind == "layer" else KINDS[child.kind]
        return kind(child, self.spec, self.head_spec, self.dtype, self.remat, self.index)

    @nn.nowrap
    def role(self, role: str) -> Any:
        """The submodule with a role."""
        return getattr(self, self.roles[role])

    @nn.nowrap
    def has(self, role: str) -> bool:
        """Whether a submodule has that role."""
        return role in self.roles

    @nn.nowrap
    def at(self, role: str) -> Any:
        """The module with a role, here or in a submodule outside of the layers."""
        found: Any = self
        for name in dict(self.layout.paths())[role]:
            found = getattr(found, name)
        return found

    @nn.nowrap
    def dropped(self, x: Array, role: str, p: float, train: bool) -> Array:
        """Dropout with probability `p` in training, if the module tree has it here."""
        if role not in self.layout.children.values():
            return x
        return dropout(self, x, p, train)


class Layers(_Node):
    """The layers in order, named by their indices."""

    def setup(self) -> None:
        make = KINDS["layer"]
        self.layers = [
            make(self.layout, self.spec, self.head_spec, self.dtype, index=i, name=str(i))
            for i in range(self.spec.layers)
        ]

    def __call__(
        self, x: Array, context: Any, caches: tuple[Any, ...]
    ) -> tuple[list[Array], list[Array | None], list[Any]]:
        """The outputs of each layer: hidden states, attention weights, its cache."""
        states, weights, after = [], [], []
        for layer, cache in zip(self.layers, caches, strict=True):
            run: Any = nn.remat(_call_layer) if self.remat and context.train else _call_layer
            x, weight, cache = run(layer, x, context, cache)
            states.append(x)
            weights.append(weight)
            after.append(cache)
        return states, weights, after


def _call_layer(layer: Any, x: Array, context: Any, cache: Any) -> Any:
    return layer(x, context, cache)


def _role(child: tree.ModuleSpec) -> str:
    return "layers" if child.kind == "layer" else child.kind


def dropout(part: nn.Module, x: Array, p: float, train: bool) -> Array:
    """Dropout with probability `p` in training, from the module's "dropout" key."""
    if not (p and train):
        return x
    kept = jax.random.bernoulli(part.make_rng("dropout"), 1 - p, x.shape)
    return jnp.where(kept, x / (1 - p), 0.0)
