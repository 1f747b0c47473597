"""Which token of a row a head over texts reads, beside PyTorch, in any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import assert_close


def check(theirs: Any, ours: Any, given: dict[str, Any], numpy: Callable[[Any], Any]) -> None:
    """Rows padded on the right whose last token is the pad token, as where it is the eos: `config.last_token_by`, which
    the files give first, decides at each call whether that one counts."""
    assert ours.config.last_token_by == "attention_mask"  # of the file
    given["input_ids"][torch.arange(3), given["attention_mask"].sum(1) - 1] = theirs.config.pad_token_id
    found = []
    for by in ("attention_mask", "pad_id", None):
        ours.config.last_token_by = theirs.config.last_token_by = by
        with torch.no_grad():
            expected = theirs(**given).logits
        found.append(np.asarray(ours(**numpy(given)).logits))
        assert_close(f"by {by}", found[-1], expected, 1e-4)  # fp32; another token is 0.1 away
    assert np.abs(found[0] - found[1]).max() > 0.1
    assert np.array_equal(found[1], found[2])
