"""Hidden states of a batch of texts without padding, by the native library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def packed_states(model: Any, ids: Sequence[Sequence[int]]) -> Tensor | None:
    """The last hidden states of the texts, [total tokens, width] float32, the rows of all texts one after another.

    `ids`: the token ids of each text, without padding. None if the native library cannot run this model: then call
    the model with padding.
    """
    del model, ids
    return None
