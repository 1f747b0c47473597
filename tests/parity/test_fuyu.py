"""Fuyu against transformers: q/k norms, partial RoPE with every scaling, and image patches under both names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PADDINGS, expected, expected_logits
from measure import assert_close
from tiny_families import (
    PADS,
    PATCH,
    PATCH_SIZE,
    VOCAB,
    fields,
    model_inputs,
    model_pair,
    monoblock_model,
    pair,
    with_images,
)

from monoblock import FuyuConfig

ATOL = 2e-5  # fp32 through the fused kernels
NAME = "FuyuForCausalLM"


@torch.no_grad()
def test_image_patches_and_pixel_values() -> None:
    theirs, ours = pair(NAME)
    ids, mask, patches, indices = with_images((6, 0, 9))
    options = {"attention_mask": mask, "output_hidden_states": True}
    there = theirs(ids, pixel_values=torch.cat(patches), **options)
    forms = {
        "lists": {"image_patches": patches, "image_patches_indices": indices},
        "lists of the processor": {
            "image_patches": [p[None] for p in patches],
            "image_patches_indices": indices,
        },
        "in order": {"image_patches": patches},
        "new name": {"pixel_values": torch.cat(patches)},
        "new name, rows": {"pixel_values": patches},
    }
    run = expected(ours, ids, mask, patches=torch.nn.utils.rnn.pad_sequence(patches, batch_first=True))
    for what, given in forms.items():
        found = ours(ids, **options, **given)
        assert_close(f"Fuyu, {what}", found.logits, there.logits, ATOL, mask)
        for a, b, c in zip(found.hidden_states, there.hidden_states, run.hidden_states, strict=True):
            assert_close(f"Fuyu, {what}, states", a, b, ATOL, mask)
            assert_close(f"Fuyu, {what}, oracle", a, c, ATOL, mask)
    assert (ours(ids, attention_mask=mask).logits - there.logits)[0].abs().max() > 0.1, (
        "the image must have an effect"
    )


@torch.no_grad()
def test_stacked_patches() -> None:
    theirs, ours = pair(NAME)
    ids, mask, patches, indices = with_images((6, 6))
    there = theirs(ids, pixel_values=torch.stack(patches), attention_mask=mask).logits
    for given in (
        {"pixel_values": torch.stack(patches)},
        {"image_patches": torch.stack(patches), "image_patches_indices": indices},
    ):
        assert_close("Fuyu, stacked", ours(ids, attention_mask=mask, **given).logits, there, ATOL, mask)


@torch.no_grad()
def test_image_patches_indices() -> None:
    """In any order, and for a part of the patches: a truncated prompt has fewer image tokens."""
    _, ours = pair(NAME)
    ids, mask, patches, indices = with_images((6, 0, 9))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shuffled = [patches[0][order], *patches[1:]]
    back = indices.clone()
    back[0][indices[0] >= 0] = torch.argsort(order)[indices[0][indices[0] >= 0]]
    options = {"attention_mask": mask}
    plain = ours(ids, image_patches=patches, image_patches_indices=indices, **options).logits
    found = ours(ids, image_patches=shuffled, image_patches_indices=back, **options).logits
    assert_close("Fuyu, shuffled", found, plain, 1e-6)
    more = [torch.cat((own, torch.ones(2, PATCH_SIZE))) for own in patches]
    assert torch.equal(ours(ids, image_patches=more, image_patches_indices=indices, **options).logits, plain)


def test_labels_and_gradients_with_images() -> None:
    theirs, ours = pair(NAME)
    ids, mask, patches, indices = with_images((6, 0, 9))
    labels = ids.masked_fill((mask == 0) | (ids == PATCH) | (mask.roll(1, 1) == 0), -100)
    for module in (theirs, ours):
        module.zero_grad()
    there = theirs(ids, pixel_values=torch.cat(patches), attention_mask=mask, labels=labels)
    found = ours(
        ids, image_patches=patches, image_patches_indices=indices, attention_mask=mask, labels=labels
    )
    assert_close("Fuyu, loss with images", found.loss, there.loss, ATOL)
    there.loss.backward()
    found.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name in (
        "model.vision_embed_tokens.weight",
        "model.vision_embed_tokens.bias",
        "model.language_model.embed_tokens.weight",
    ):
        assert grads[name].abs().max() > 1e-4
        assert_close("Fuyu, gradients with images", ours.get_parameter(name).grad, grads[name], ATOL)


def test_invalid_patches_raise() -> None:
    _, ours = pair(NAME)
    ids, _, patches, indices = with_images((6, 0, 9))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_patches": patches, "pixel_values": patches}, "two names of the same input: give one"),
        ({"image_patches_indices": indices}, "image_patches_indices need image_patches"),
        (
            {"image_patches": patches[:2], "image_patches_indices": indices},
            "one set for each of the 3 rows, got 2",
        ),
        (
            {"image_patches": [patches[0][:4], *patches[1:]], "image_patches_indices": indices},
            "row 0 has tokens for 6 image patches, but 4 were given",
        ),
        (
            {"image_patches": patches, "image_patches_indices": indices[:, :-1]},
            r"image_patches_indices must be \(batch, tokens\) = \(3, ",
        ),
        ({"pixel_values": torch.cat(patches)[:-1]}, "14 image patches for 15 tokens of the id 7"),
        ({"pixel_values": torch.zeros(15, 12)}, r"image patches must be \(.., 48\), got \(15, 12\)"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            ours(ids, **given)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        ours(inputs_embeds=torch.zeros(1, 4, ours.spec.width), pixel_values=torch.cat(patches))


ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.5},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize(
    ("case", "share"), [(c, s) for c in ROPES for s in (0.25, 0.5, 1.0) if (c, s) != ("dynamic", 0.25)]
)
@torch.no_grad()
def test_partial_rope_and_scaling(case: str, share: float) -> None:
    """transformers reads partial_rotary_factor only from a nested text_config."""
    rope = {"rope_type": "default", **ROPES[case], "rope_theta": 300.0, "partial_rotary_factor": share}
    rope["rope_type"] = rope.pop("type", "default")
    flat = {**fields("fuyu"), "hidden_size": 48, "max_position_embeddings": 14 if case == "dynamic" else 64}
    text = (
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "max_position_embeddings",
    )
    nested = {name: flat.pop(name) for name in text}
    flat.pop("rope_theta")
    whole = {
        **flat,
        "text_config": {
            "model_type": "persimmon",
            **nested,
            "rope_parameters": rope,
            "pad_token_id": PADS["fuyu"],
        },
    }
    theirs, ours = model_pair(NAME, **whole)
    assert ours.spec.positions[0].dim == int(8 * share)
    scaling = {"rope_scaling": ROPES[case]} if ROPES[case] else {}
    same = monoblock_model(
        NAME, theirs, **{**flat, **nested, "rope_theta": 300.0, "partial_rotary_factor": share, **scaling}
    )
    assert same.spec == ours.spec
    for padding in PADDINGS:
        ids, mask = model_inputs(NAME, padding)
        found = ours(ids, attention_mask=mask).logits
        if case != "dynamic" or mask is None:
            assert_close(f"Fuyu, {case}", found, theirs(ids, attention_mask=mask).logits, ATOL, mask)
        assert_close(
            f"Fuyu, {case}, oracle",
            found,
            expected_logits(ours, expected(ours, ids, mask)),
            ATOL,
            mask,
        )


@torch.no_grad()
def test_without_qk_norms() -> None:
    theirs, ours = model_pair(NAME, **fields("fuyu", qk_layernorm=False))
    assert ours.spec.attention.qk_norm is None
    ids, mask = model_inputs(NAME, "left")
    assert_close(
        "Fuyu, no norms",
        ours(ids, attention_mask=mask).logits,
        theirs(ids, attention_mask=mask).logits,
        ATOL,
        mask,
    )


@torch.no_grad()
def test_relu_squared() -> None:
    theirs, ours = model_pair(NAME, **fields("fuyu", hidden_act="relu2"))
    ids, _ = model_inputs(NAME, "none")
    assert_close("Fuyu, relu2", ours(ids).logits, theirs(ids).logits, ATOL)


def test_text_logits_vary_and_depend_on_earlier_tokens() -> None:
    """The comparisons above are not of constants, and attention has an effect."""
    theirs, ours = pair(NAME)
    ids, mask = model_inputs(NAME, "left")
    logits = ours(ids, attention_mask=mask).logits
    assert logits[mask == 1].std() > 0.5
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    assert (ours(other, attention_mask=mask).logits - logits)[0, -1].abs().max() > 1e-3
    assert theirs(ids, attention_mask=mask).logits.data_ptr() != logits.data_ptr()


def test_inconsistent_fields_raise() -> None:
    with pytest.raises(
        ValueError, match=r"FuyuConfig.hidden_size \(100\) must be a multiple of num_attention_heads"
    ):
        FuyuConfig(hidden_size=100).to_spec()
    with pytest.raises(ValueError, match="dynamic rotary scaling needs a rotary dim above 2"):
        FuyuConfig(partial_rotary_factor=0.04, rope_scaling={"type": "dynamic", "factor": 2.0}).to_spec()
