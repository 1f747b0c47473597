"""The token that a sequence classification head reads, compared with PyTorch, for any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import assert_close


def check(theirs: Any, ours: Any, given: dict[str, Any], numpy: Callable[[Any], Any]) -> None:
    """Right-padded rows whose last token is the pad token (as where it is also the eos): `config.last_token_by` decides
    at each call whether that token is read."""
    assert ours.config.last_token_by == "attention_mask"  # from config.json
    given["input_ids"][torch.arange(3), given["attention_mask"].sum(1) - 1] = theirs.config.pad_token_id
    found = []
    for by in ("attention_mask", "pad_id", None):
        ours.config.last_token_by = theirs.config.last_token_by = by
        with torch.no_grad():
            expected = theirs(**given).logits
        found.append(np.asarray(ours(**numpy(given)).logits))
        assert_close(f"by {by}", found[-1], expected, 1e-4)  # fp32; outputs for another token differ by 0.1
    assert np.abs(found[0] - found[1]).max() > 0.1
    assert np.array_equal(found[1], found[2])
