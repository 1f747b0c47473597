"""Preparation of the blocks' inputs from the network's inputs."""

from __future__ import annotations

from collections.abc import Mapping

from jax import Array

from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.model import ForwardContext
from monoblock.backends.flax.namespace import XP
from monoblock.backends.flax.scope import Scope
from monoblock.backends.xla import inputs
from monoblock.backends.xla.inputs import ForwardOptions, Kinds
from monoblock.spec import ArchSpec

KINDS = Kinds(ForwardContext, Scope)


def prepare(
    spec: ArchSpec, given: Mapping[str, Array], count: int, cache: Cache | None, options: ForwardOptions
) -> ForwardContext:
    """The context of a forward pass of `count` tokens."""
    return inputs.prepare(XP, KINDS, spec, given, count, cache, options)
