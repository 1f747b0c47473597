"""Image patches in a Flax call: both ways to say where they go, under jit too, and what can be wrong with them."""

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
IDS, MASK, PATCHES, PLACES = with_images((4, 2))
SETS = [own.numpy() for own in PATCHES]
ATOL = 1e-5  # fp32, 3 layers; measured 3e-6


def expected() -> torch.Tensor:
    with torch.no_grad():
        out = torch_model(NAME)(IDS, attention_mask=MASK, image_patches=PATCHES, image_patches_indices=PLACES)
    return out.logits


def test_both_ways_to_place_patches() -> None:
    model, ids, mask = flax_model(NAME), IDS.numpy(), MASK.numpy()
    by_index = model(ids, mask, image_patches=SETS, image_patches_indices=PLACES.numpy())
    in_order = model(ids, mask, pixel_values=np.concatenate(SETS))
    assert_close("flax: patches by index", by_index.logits, expected(), ATOL, MASK)
    assert_close("flax: patches in order", in_order.logits, expected(), ATOL, MASK)


def test_patches_under_jit() -> None:
    model = flax_model(NAME)

    @jax.jit
    def run(ids: Any, mask: Any, sets: Any, places: Any) -> Any:
        one = model(ids, mask, image_patches=sets, image_patches_indices=places).logits
        return one, model(ids, mask, image_patches=jax.numpy.concatenate(sets)).logits

    for logits in run(IDS.numpy(), MASK.numpy(), SETS, PLACES.numpy()):
        assert_close("flax: patches under jit", logits, expected(), ATOL, MASK)


WRONG: dict[str, dict[str, Any]] = {
    "image_patches and pixel_values are two names": {"image_patches": SETS, "pixel_values": SETS},
    "image_patches_indices say where": {"image_patches_indices": PLACES},
    "one set for each of the 2 rows, got 1": {"image_patches": SETS[:1], "image_patches_indices": PLACES},
    "row 0 has tokens for 4 image patches, but 1 were given": {
        "image_patches": [own[:1] for own in SETS],
        "image_patches_indices": PLACES,
    },
    "image_patches_indices must be (batch, tokens) = (2, ": {
        "image_patches": SETS,
        "image_patches_indices": PLACES[:, 1:],
    },
    "4 image patches for 6 tokens of the id 7": {"image_patches": SETS[0]},
    "image patches must be (.., 48), got (4, 47)": {"image_patches": [own[:, 1:] for own in SETS]},
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_patches_get_one_clear_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        flax_model(NAME)(IDS, MASK, **WRONG[text])
    assert "\n" not in str(caught.value)


def test_patches_with_embeddings_are_refused() -> None:
    embeds = np.zeros((2, 5, 48), np.float32)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        flax_model(NAME)(inputs_embeds=embeds, image_patches=SETS)
