"""The next tokens of several sequences in one forward pass of a model's modules.

The tokens of all sequences are one row without padding, so that each matrix is read once, and a sharded model has the
collectives of one pass. Attention computes one sequence after the other, each with a cache of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monoblock.backends.pytorch import heads
from monoblock.backends.pytorch.cache import DynamicCache
from monoblock.backends.pytorch.inputs import prepare
from monoblock.backends.pytorch.model import Attention, ForwardContext, finished, layer_contexts
from monoblock.generation.batches import SequenceChunk
from monoblock.outputs import BaseModelOutputWithPast
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Rotary


def obstacle(model: Any) -> str | None:
    """Why several sequences of a model cannot be one row; None if they can."""
    if model.row.head != "causal":
        return f"{type(model).__name__} is not a plain language model"
    if is_dynamic(model.spec.position(Rotary)):
        return "the angles of dynamic RoPE depend on the length of each sequence"
    return None


def batch_context(
    spec: ArchSpec, chunks: Sequence[SequenceChunk], caches: Sequence[DynamicCache], device: torch.device
) -> ForwardContext:
    """The context of a row with the tokens of all chunks."""
    own: list[ForwardContext] = []
    for chunk, cache in zip(chunks, caches, strict=True):
        shape = (1, len(chunk.tokens), device)
        own.append(prepare(spec, shape, {"past_key_values": cache}, use_cache=True).context)
    ends = list(itertools.accumulate(len(chunk.tokens) for chunk in chunks))
    spans = [slice(end - len(chunk.tokens), end) for end, chunk in zip(ends, chunks, strict=True)]
    whole = replace(own[0], positions_bs=torch.cat([one.positions_bs for one in own], dim=1), cache=None)

    def attend(part: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads (1, h, s, d) of the row to their output (1, s, h * d)."""
        found: list[Tensor] = []
        for span, one in zip(spans, own, strict=True):
            if one.cos is None and whole.cos is not None and whole.sin is not None:
                one.cos, one.sin = whole.cos[..., span, :], whole.sin[..., span, :]
            one.scope.slopes_h = whole.scope.slopes_h
            found.append(part.attend(q[:, :, span], k[:, :, span], v[:, :, span], one)[0])
        return torch.cat(found, dim=1)

    whole.one_token = attend
    return whole


def embedded(model: Any, chunks: Sequence[SequenceChunk]) -> Tensor:
    """The token embeddings of all chunks (1, s, w), with those of their images."""
    ids = [token for chunk in chunks for token in chunk.tokens]
    x = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    start = 0
    for chunk in chunks:
        if (images := chunk.images) is not None:
            own = images.rows[chunk.past : chunk.past + len(chunk.tokens)]
            if at := [index for index, row in enumerate(own) if row >= 0]:
                x[0, [start + index for index in at]] = images.embeds[[own[index] for index in at]].to(x)
        start += len(chunk.tokens)
    return x


def wanted_rows(chunks: Sequence[SequenceChunk], device: torch.device) -> Tensor:
    """The indices in the row of the tokens whose scores are computed."""
    ends = itertools.accumulate(len(chunk.tokens) for chunk in chunks)
    rows = [row for end, chunk in zip(ends, chunks, strict=True) for row in range(end - chunk.wanted, end)]
    return torch.tensor(rows, dtype=torch.long, device=device)


def scores(model: Any, chunks: Sequence[SequenceChunk], caches: Sequence[DynamicCache]) -> Tensor:
    """The scores (sum of wanted, vocabulary) of a causal language model, float32."""
    context = batch_context(model.bare.spec, chunks, caches, model.device)
    hidden = model.bare.embedded(embedded(model, chunks), context)
    return head_scores(model, run_stage(model, hidden, context), chunks)


def run_stage(
    model: Any, hidden: Tensor, context: ForwardContext, start: int = 0, end: int | None = None
) -> Tensor:
    """The output (1, s, w) of the layers from `start` to `end` - 1, after the last one normed; all by default."""
    base = model.bare
    part = base.role("stack") if base.has("stack") else base
    for layer, own in layer_contexts(part, hidden, context)[start:end]:
        hidden = own.after(layer(hidden, own))
    return finished(part, hidden, context) if end in (None, base.spec.layers) else hidden


def head_scores(model: Any, hidden: Tensor, chunks: Sequence[SequenceChunk]) -> Tensor:
    """The scores of the wanted tokens from the hidden states (1, s, w) of all."""
    rows = wanted_rows(chunks, hidden.device)
    out = BaseModelOutputWithPast(last_hidden_state=hidden[:, rows])
    return heads.outputs(model, out, {})["logits"][0].float()
