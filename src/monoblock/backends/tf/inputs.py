"""Preparation of the blocks' inputs from the network's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.model import ForwardContext
from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.ops import Size, Tensor
from monoblock.backends.tf.scope import Scope
from monoblock.backends.xla import inputs
from monoblock.backends.xla.inputs import ForwardOptions, Kinds
from monoblock.spec import ArchSpec

KINDS = Kinds(ForwardContext, Scope)


def prepare(
    spec: ArchSpec, given: Mapping[str, Tensor], count: Size, cache: Cache | None, options: ForwardOptions
) -> ForwardContext:
    """The context of a forward pass of `count` tokens."""
    context = inputs.prepare(XP, KINDS, spec, given, count, cache, options)
    return replace(context, head_mask=given.get("head_mask"))
