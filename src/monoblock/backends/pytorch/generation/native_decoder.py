"""Decode steps in the native library: one call runs the whole model for a few new tokens.

`obstacle` returns the reason why a model cannot use it, `of` creates the `Steps` of one generation. The library
computes the same as the modules, with float32 activations for any dtype of the weights, including peft's LoRA
adapters.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from monoblock import native
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.cache import Cache, DynamicCache, StaticCache
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.kernels.linear import FORMATS
from monoblock.backends.pytorch.native_weights import (
    Inventory,
    NativeWeights,
    library_obstacle,
    speed_obstacle,
    weights,
    weights_obstacle,
)
from monoblock.native.abi import DecodeStep, LayerCache

# Tokens of a step, all rows together; for more, the modules' large matrix products are faster.
MOST = 16
# Formats whose products of 8-bit integers are at the highest levels only.
INTEGERS = {native.FORMATS["int8"], native.FORMATS["int4"]}


# ---------------------------------------------------------------------------- obstacles


def obstacle(model: ModelBase, inventory: Inventory | None = None) -> str | None:
    """Why the library cannot run this model's steps; None if it can. `inventory`: after its `fuse_groups`."""
    if (why := library_obstacle(model)) is not None:
        return why
    if (why := dispatch.spec_obstacle(model.spec)) is not None:
        return why
    if not model.can_generate():
        return f"{type(model).__name__} does not generate"
    return weights_obstacle(model, inventory) or speed_obstacle(model, inventory)


@functools.cache
def _unrounded() -> Any:
    """The library whose steps never round the inputs of bfloat16 weights.

    At the levels with dot products of bfloat16, those of one token do not, but those of several do
    (`native/prepare_inputs.hpp`). The level below adds in the same order and rounds neither; for `sve256`, whose
    vectors are longer, in another order.
    """
    unrounded = {"avx512_vnni_bf16": "avx512", "avx512_amx": "avx512"}
    unrounded |= dict.fromkeys(("neon_i8mm_bf16", "sve256"), "neon_dotprod")
    if (wanted := unrounded.get(native.level() or "")) is not None:
        found, level, _ = native.choose(wanted)
        if level == wanted:
            return found
    return native.library()


# ---------------------------------------------------------------------------- steps


def call_obstacle(model: ModelBase, cache: Cache | None, inventory: Inventory | None = None) -> str | None:
    """Why the library cannot run the steps of one generation over that cache; None if it can. `inventory`: see
    `obstacle`."""
    if cache is None:
        return "use_cache=False"
    if type(cache) not in (DynamicCache, StaticCache):
        return f"a cache of the class {type(cache).__name__}"
    return obstacle(model, inventory)


def of(model: ModelBase, cache: Cache | None, *, verifies: bool = False) -> Steps | None:
    """The native steps of one generation with that cache; None if the modules must be used.

    `verifies`: several tokens at once have the same scores, to the bit, as one after the other.
    """
    if cache is None:
        return None
    inventory = Inventory(model)
    inventory.fuse_groups()  # merging an adapter, for example, reallocates a matrix
    if call_obstacle(model, cache, inventory) is not None:
        return None
    # References to the tensors, so that the memory that the structures point to is not freed.
    tensors = [tensor.detach() for _, _, tensor in inventory.tensors()]
    return Steps(weights(model, inventory, tensors), tensors, cache, verifies=verifies)


class Steps:
    """The native steps of one generation: weights, cache and scratch memory."""

    def __init__(
        self, weights: NativeWeights, tensors: list[Tensor], cache: Cache, *, verifies: bool = False
    ) -> None:
        """`verifies`: see `of`."""
        self.weights, self.tensors, self.cache = weights, tensors, cache
        self._run = (
            _unrounded() if verifies and not weights.formats & INTEGERS else native.library()
        ).mb_step
        self._caches = (LayerCache * weights.layers)()
        # The cache buffers that the structures point to, and their number of rows.
        self._rows, self._bound = 0, list[Tensor]()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._step = DecodeStep(caches=self._caches)

    def run(
        self,
        ids_bn: Tensor,
        *,
        types_bn: Tensor | None = None,
        positions_bn: Tensor | None = None,
        valid_bm: Tensor | None = None,
    ) -> Tensor | None:
        """Process n tokens per row: logits (b, n, vocabulary) after each, float32.

        `types_bn`: token type ids; `positions_bn` (b or 1, n): explicit positions; `valid_bm` (b, cached + n):
        booleans, False for padding. Returns None, without any effect, if the modules must process these tokens.
        """
        rows, count = ids_bn.shape
        past = self.cache.get_seq_length()
        fits = past > 0 and rows * count <= MOST and _shaped(ids_bn, past, types_bn, positions_bn, valid_bm)
        if not fits or not self._bind(rows, count, past):
            return None
        step, ids = self._step, ids_bn.long().contiguous()
        types = None if types_bn is None else types_bn.long().contiguous()
        positions = None if positions_bn is None else positions_bn.long().contiguous()
        valid = None if valid_bm is None else valid_bm.contiguous()
        logits = torch.empty((rows, count, self.weights.vocab), dtype=torch.float32)
        step.ids, step.logits = ids.data_ptr(), logits.data_ptr()
        step.type_ids = None if types is None else types.data_ptr()
        step.positions = None if positions is None else positions.data_ptr()
        step.position_stride = 0 if positions is None or len(positions) == 1 else count
        step.valid, step.valid_stride = None if valid is None else valid.data_ptr(), past + count
        step.rows, step.tokens, step.past = rows, count, past
        step.threads = torch.get_num_threads()
        while (answer := self._run(self.weights.struct, step)) > 0:
            self._scratch = torch.empty(answer, dtype=torch.uint8)
            step.scratch, step.scratch_bytes = self._scratch.data_ptr(), answer
        if answer:
            return None
        for layer in range(self.weights.layers):
            self.cache.advance(layer, count)
        return logits

    def _bind(self, rows: int, count: int, past: int) -> bool:
        """Reserve cache slots for the new tokens and set the pointers; False if the library cannot use the buffers."""
        cache, layers = self.cache, self.weights.layers
        if len(cache) != layers or cache.lengths.count(past) != layers:
            return False
        indices = [cache.reserve(layer, count) for layer in range(layers)]
        buffers = [*cache.keys, *cache.values]
        if self._rows == rows and all(map(_is, buffers, self._bound)):
            for entry, index in zip(self._caches, indices, strict=True):
                entry.index = index
            return True
        self._rows = 0
        first, dim = buffers[0], self.weights.struct.head_dim
        for buffer in buffers:
            plain = buffer.device.type == "cpu" and buffer.dtype == first.dtype and buffer.stride(-1) == 1
            shape = (*buffer.shape[:2], buffer.shape[3])
            if not plain or shape != (rows, self.weights.struct.kv_heads, dim) or buffer.requires_grad:
                return False
        if first.dtype not in FORMATS:
            return False
        self._step.cache_bf16 = first.dtype == torch.bfloat16
        for entry, index, keys, values in zip(self._caches, indices, cache.keys, cache.values, strict=True):
            entry.keys, entry.key_strides = keys.data_ptr(), keys.stride()[:3]
            entry.values, entry.value_strides = values.data_ptr(), values.stride()[:3]
            entry.index = index
        self._rows, self._bound = rows, buffers
        return True


def _shaped(
    ids_bn: Tensor, past: int, types_bn: Tensor | None, positions_bn: Tensor | None, valid_bm: Tensor | None
) -> bool:
    """Whether the shapes are those that `Steps.run` expects; for others the modules raise an error."""
    rows, count = ids_bn.shape
    if types_bn is not None and types_bn.shape != (rows, count):
        return False
    if positions_bn is not None and positions_bn.shape not in ((rows, count), (1, count)):
        return False
    return valid_bm is None or (valid_bm.dtype == torch.bool and valid_bm.shape == (rows, past + count))


def _is(one: Any, other: Any) -> bool:
    return one is other
