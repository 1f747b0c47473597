"""Classifier-free guidance (arXiv 2306.17806): logits pushed away from those of a negative prompt."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.decoder import Decoder, GenerationPlan, GenerativeModel
from monoblock.generation.limits import check_prompt, check_room
from monoblock.generation.prompt import GenerateArguments, as_array


class Guidance:
    """A processor: log p' + scale * (log p - log p'), where p' continues the negative prompt with the same tokens.

    It runs the model once more for each token, on a cache of its own. It must therefore be called once per step, in
    order, and `reorder` must be called when rows are reordered.
    """

    def __init__(
        self,
        ops: ArrayOps,
        scale: float,
        decoder: Decoder,
        prompt: tuple[Array, Array | None],
        expand: Callable[[Array], Array],
    ):
        self.ops, self.scale, self.decoder = ops, scale, decoder
        self.prompt, self.expand = prompt, expand
        self.prefilled = False

    def __call__(self, ids_bn: Array, scores_bv: Array) -> Array:
        logs_bv = self.ops.log_softmax(scores_bv)
        other_bv = self.ops.log_softmax(self._other(ids_bn))
        return self.scale * (logs_bv - other_bv) + other_bv

    def _other(self, ids_bn: Array) -> Array:
        if self.prefilled:
            return self.decoder.step(ids_bn[:, -1:])
        self.prefilled = True
        first_bv = self.decoder.prefill(*self.prompt)
        if first_bv.shape[0] == ids_bn.shape[0]:
            return first_bv
        self.decoder.reorder(self.expand(self.ops.array(list(range(int(first_bv.shape[0]))))))
        return self.expand(first_bv)

    def reorder(self, index_b: Array) -> None:
        """Replace row i by row index[i]."""
        self.decoder.reorder(index_b)


def build(
    model: GenerativeModel,
    call: GenerateArguments,
    plan: GenerationPlan,
    prompt_bn: Array,
    expand: Callable[[Array], Array],
) -> Guidance | None:
    """The guidance that the call requests, or None; ValueError if its negative prompt does not fit."""
    scale, ops = plan.config.guidance_scale, model.ops
    if scale is None or scale == 1:
        if call.negative_prompt_ids is not None or call.negative_prompt_attention_mask is not None:
            raise ValueError(
                "negative_prompt_ids have no effect without guidance_scale: set it, for example to 1.5"
            )
        return None
    ids_bm, mask_bm = _negative_prompt(ops, call, prompt_bn)
    values = ops.to_numpy(ids_bm)
    check_prompt("negative_prompt_ids", int(values.min()), int(values.max()), model.vocab)
    used = values.shape[1] if mask_bm is None else int(ops.to_numpy(mask_bm).sum(1).max())
    check_room("the negative prompt", used, plan.new_tokens, model.max_positions)
    config = copy.copy(plan.config)
    config.return_dict_in_generate = False
    own = dataclasses.replace(plan, config=config, prompt_length=int(ids_bm.shape[1]))
    return Guidance(ops, float(scale), model.decoder(own, {}), (ids_bm, mask_bm), expand)


def _negative_prompt(ops: ArrayOps, call: GenerateArguments, prompt_bn: Array) -> tuple[Array, Array | None]:
    """Ids and mask; without ids the last token of each prompt, as in transformers."""
    if call.negative_prompt_ids is None:
        if call.negative_prompt_attention_mask is not None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_ids: pass both")
        if prompt_bn.shape[1] == 0:
            raise ValueError("guidance of a prompt that is given as inputs_embeds needs negative_prompt_ids")
        return prompt_bn[:, -1:], None
    ids_bm: Any = as_array(ops, "negative_prompt_ids", call.negative_prompt_ids, "token ids (rows, tokens)")
    if len(ids_bm.shape) != 2 or ids_bm.shape[0] != prompt_bn.shape[0] or ids_bm.shape[1] == 0:
        raise ValueError(
            f"negative_prompt_ids must have the shape ({prompt_bn.shape[0]}, tokens), one row for each prompt, got "
            f"{tuple(ids_bm.shape)}"
        )
    if call.negative_prompt_attention_mask is None:
        return ids_bm, None
    name = "negative_prompt_attention_mask"
    mask = ops.to_numpy(as_array(ops, name, getattr(call, name), "1 for tokens and 0 for padding")) != 0
    if mask.shape != tuple(ids_bm.shape):
        raise ValueError(
            f"negative_prompt_attention_mask must have the shape of negative_prompt_ids, {tuple(ids_bm.shape)}, got "
            f"{mask.shape}"
        )
    return ids_bm, None if mask.all() else ops.array(mask.astype(np.int64))
