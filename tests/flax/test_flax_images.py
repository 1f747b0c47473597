"""Image patches in a Flax call: under jit, and invalid patches."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax_models import flax_model, torch_model
from measure import assert_close
from tiny_families import with_images

NAME = "FuyuForCausalLM"
IDS, MASK, PATCHES, INDICES = with_images((4, 2))
ARRAYS = [own.numpy() for own in PATCHES]
ATOL = 1e-5  # fp32, 3 layers; measured 3e-6


def expected() -> torch.Tensor:
    with torch.no_grad():
        out = torch_model(NAME)(
            IDS, attention_mask=MASK, image_patches=PATCHES, image_patches_indices=INDICES
        )
    return out.logits


def test_patches_under_jit() -> None:
    model = flax_model(NAME)

    @jax.jit
    def run(ids: Any, mask: Any, patches: Any, indices: Any) -> Any:
        one = model(ids, mask, image_patches=patches, image_patches_indices=indices).logits
        return one, model(ids, mask, image_patches=jax.numpy.concatenate(patches)).logits

    for logits in run(IDS.numpy(), MASK.numpy(), ARRAYS, INDICES.numpy()):
        assert_close("flax: patches under jit", logits, expected(), ATOL, MASK)


WRONG: dict[str, dict[str, Any]] = {
    "image_patches and pixel_values are two names": {"image_patches": ARRAYS, "pixel_values": ARRAYS},
    "image_patches_indices need image_patches": {"image_patches_indices": INDICES},
    "one set for each of the 2 rows, got 1": {"image_patches": ARRAYS[:1], "image_patches_indices": INDICES},
    "row 0 has tokens for 4 image patches, but 1 were given": {
        "image_patches": [own[:1] for own in ARRAYS],
        "image_patches_indices": INDICES,
    },
    "image_patches_indices must be (batch, tokens) = (2, ": {
        "image_patches": ARRAYS,
        "image_patches_indices": INDICES[:, 1:],
    },
    "4 image patches for 6 tokens of the id 7": {"image_patches": ARRAYS[0]},
    "image patches must be (.., 48), got (4, 47)": {"image_patches": [own[:, 1:] for own in ARRAYS]},
}


@pytest.mark.parametrize("text", WRONG)
def test_invalid_patches_raise(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        flax_model(NAME)(IDS, MASK, **WRONG[text])
    assert "\n" not in str(caught.value)


def test_patches_with_embeddings_raise() -> None:
    embeds = np.zeros((2, 5, 48), np.float32)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        flax_model(NAME)(inputs_embeds=embeds, image_patches=ARRAYS)
