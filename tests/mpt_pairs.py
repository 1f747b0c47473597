"""Pairs of the same random model in transformers and here, for the five MPT classes, and labels for their losses."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from helpers import PAD, randomised

import monoblock

VOCAB, LABELS, TOKENS = 89, 4, 23


def fields(heads: int, **more: Any) -> dict[str, Any]:
    # Projections have a standard deviation of 1.2, so that the clip changes them.
    attn = {"clip_qkv": 0.9, "softmax_scale": 0.23}
    sizes = {"d_model": 6 * heads, "n_heads": heads, "n_layers": 3, "vocab_size": VOCAB, "max_seq_len": 64}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    return {**sizes, **ids, "layer_norm_epsilon": 1e-3, "num_labels": LABELS, "attn_config": attn, **more}


@functools.cache
def pair(name: str, heads: int = 6, tied: bool = True, labels: int = LABELS) -> tuple[Any, Any]:
    """The same random model in transformers and here."""
    kwargs = fields(heads, tie_word_embeddings=tied, num_labels=labels)
    theirs = randomised(getattr(transformers, name)(transformers.MptConfig(**kwargs)), seed=heads).eval()
    ours = getattr(monoblock, name)(monoblock.MptConfig(**kwargs)).eval()
    ours.load_state_dict(
        {k: v.clone() for k, v in theirs.state_dict().items() if k != "lm_head.weight" or not tied}
    )
    return theirs, ours


def logits_of(out: Any) -> torch.Tensor:
    """All outputs of a head, (batch, [tokens,] outputs)."""
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    return out.logits if "logits" in out else out.last_hidden_state


def labels_of(ids: torch.Tensor, mask: torch.Tensor | None, high: int) -> torch.Tensor:
    """Labels; -100 at padding, at the token that follows padding, and at every sixth token."""
    labels = (ids * 7 + 1) % high
    labels[:, 5::6] = -100
    if mask is not None:
        labels[(mask == 0) | (mask.roll(1, 1) == 0)] = -100
    return labels


LABELLED = {
    None: {},
    "causal": {"labels": torch.ones(2, 6, dtype=torch.long)},
    "sequence": {"labels": torch.tensor([1, 2])},
    "token": {"labels": torch.ones(2, 6, dtype=torch.long)},
    "span": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}
