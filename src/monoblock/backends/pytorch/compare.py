"""Compares the logits of two checkpoints on the same random prompts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.classes import make_class
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.formats import Checkpoint
from monoblock.conversion.logits import LogitComparison
from monoblock.heads import KINDS
from monoblock.spec import Learned

PROMPTS, LENGTH = 3, 24


def compare(one: Checkpoint, two: Checkpoint) -> LogitComparison:
    """Run both, one after the other, in the type of the first one's weights."""
    first = next(iter(one.weights.shapes()))
    dtype = getattr(torch, loading.STORED.get(one.weights.dtype(first), "float32"))
    prompts = _prompts(one)
    a, b = (_run(checkpoint, prompts, dtype) for checkpoint in (one, two))
    return LogitComparison(
        prompts=PROMPTS,
        length=prompts.shape[-1],
        difference=float((a - b).abs().max()),
        magnitude=float(a.abs().max()),
        agreement=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    )


def _prompts(checkpoint: Checkpoint) -> Tensor:
    """Random token ids (prompts, tokens), of the same seed every time; (prompts, 1, tokens) for a choice head."""
    spec, head = checkpoint.config.to_spec(), checkpoint.row.head
    learned = spec.position(Learned)
    length = min(LENGTH, learned.size - learned.offset) if learned else LENGTH
    ids = torch.randint(0, spec.vocab, (PROMPTS, length), generator=torch.Generator().manual_seed(0))
    pooled = head in KINDS and KINDS[head].pool == "last"
    if pooled and (pad := checkpoint.config.pad_token_id) is not None:
        ids[ids == pad] = (pad + 1) % spec.vocab
    return ids[:, None] if head in ("choice", "double") else ids


@torch.no_grad()
def _run(checkpoint: Checkpoint, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """The first output of the model, in float32."""
    model = _loaded(checkpoint, dtype)
    rows = [model(ids[None], return_dict=True) for ids in prompts]
    return torch.cat([next(iter(row.values())).float() for row in rows])


def _loaded(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model: by `from_pretrained` where the checkpoint is in transformers' format, else from its weights one by
    one."""
    made = make_class(checkpoint.row.name)
    if checkpoint.hub is not None:
        # A copy: from_pretrained notes the type in its config.
        return made.from_pretrained(**checkpoint.hub, config=copy.deepcopy(checkpoint.config), dtype=dtype)
    with torch.device("meta"):
        model = made(checkpoint.config)
    for canonical, source in model.sources().items():
        array = checkpoint.weights.read(canonical)
        name = checkpoint.weights.dtype(canonical)
        tensor = adapter("pt").from_buffer(bytearray(adapter("np").raw(array)), name, array.shape)
        for own, part in zip(
            source.names, loading.as_parameters(source, tensor.to(dtype)).parts, strict=True
        ):
            loading.assign(model, own, part)
    model.tie_weights()
    model.fuse_weights()
    return model.eval()
