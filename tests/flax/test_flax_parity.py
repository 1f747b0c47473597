"""The whole matrix of Flax classes equals the PyTorch backend on the same checkpoint: hidden states, attentions,
logits, losses and the gradients of all parameters, padded and not, past the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import last_token_checks
import mpt_pairs
import numpy as np
import pytest
import tiny_families
import torch
from flax_networks import canonical_of
from helpers import canonical as canonical_tensors
from helpers import randomised
from measure import assert_close, rounding
from tiny_families import labels_of, model_inputs

import monoblock
from monoblock.families import FAMILIES, class_names, family_of

GRADIENT = 5e-5  # of the largest of a parameter's gradients, or of 1
CLASSES = tuple(name for model_type in FAMILIES for name in class_names(model_type))
HEADS = {name: 3 if "QuestionAnswering" in name or "Token" in name else 6 for name in CLASSES}


def fields(name: str) -> dict[str, Any]:
    if name.startswith("Mpt"):
        return {**mpt_pairs.fields(HEADS[name]), "n_layers": 2}
    kind = tiny_families.CLASSES[name]
    return tiny_families.fields(kind, HEADS[name], **tiny_families.TWO_LAYERS[kind])


def pair(name: str, folder: Path, **more: Any) -> tuple[Any, Any]:
    """A random model on PyTorch, and on JAX from its files."""
    torch.set_num_threads(1)
    theirs = getattr(monoblock, name)(family_of(name).config(**{**fields(name), **more})).eval()
    randomised(theirs).save_pretrained(folder)
    return theirs, getattr(monoblock, "Flax" + name).from_pretrained(folder)


def inputs(name: str, padding: str) -> dict[str, torch.Tensor]:
    like = name.replace("Mpt", "Mistral")  # the same kinds of heads
    ids, mask = model_inputs(like, padding)
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def labels(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return labels_of(name.replace("Mpt", "Mistral"), given["input_ids"], given.get("attention_mask"))


def numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: x.numpy() for key, x in tensors.items()}


def compare(what: str, ours: Any, theirs: Any, mask: torch.Tensor | None, bound: float) -> None:
    """All outputs, at the tokens that are no padding."""
    found = {key for key in theirs if key not in ("loss", "mc_loss", "past_key_values")}
    assert set(ours.keys()) == found, what
    for key in found - {"hidden_states", "attentions"}:
        token = theirs[key].shape[: mask.dim()] == mask.shape if mask is not None else False
        assert_close(f"{what}: {key}", ours[key], theirs[key], bound, mask if token else None)
    rows = None if mask is None else mask.flatten(0, -2)
    for key in found & {"hidden_states", "attentions"}:
        assert len(ours[key]) == len(theirs[key])
        for a, b in zip(ours[key], theirs[key], strict=True):
            swapped = (a.swapaxes(1, 2), b.transpose(1, 2)) if key == "attentions" else (a, b)
            assert_close(f"{what}: {key}", *swapped, bound, rows)


WITH_MORE: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
# Of each family one class, for what has nothing to do with heads.
BODIES = {
    next(name for name in class_names(model_type) if "For" in name or "Head" in name)
    for model_type in FAMILIES
}


@pytest.mark.parametrize("name", CLASSES)
def test_outputs(name: str, tmp_path: Path) -> None:
    """All outputs of padded texts, and what comes alone of texts without a mask; in a class of each family, both."""
    theirs, ours = pair(name, tmp_path)
    paddings = ("none", "right") if name.startswith("MPNet") else ("none", "left", "right")
    for padding in paddings:
        given = inputs(name, padding)
        mask = given.get("attention_mask")
        with torch.no_grad():
            expected = (
                theirs(**given, **WITH_MORE, use_cache=False)
                if theirs.spec.causal
                else theirs(**given, **WITH_MORE)
            )
        bound = rounding(theirs.spec, expected)
        if mask is not None or name in BODIES:
            compare(f"{name}, {padding}", ours(**numpy(given), **WITH_MORE), expected, mask, bound)
        if mask is None or name in BODIES:
            plain = ours(**numpy(given))
            for key in plain:
                tokens = (
                    mask if mask is not None and expected[key].shape[: mask.dim()] == mask.shape else None
                )
                assert_close(f"{name}, {padding}, fused: {key}", plain[key], expected[key], bound, tokens)


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("Model") or "Double" in name])
def test_losses_and_gradients(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    given = inputs(name, "right" if name.startswith("MPNet") else "left")
    wanted = labels(name, given)
    expected = theirs(**given, **wanted)
    total = expected.loss + (expected.get("mc_loss") or 0)
    total.backward()

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> jax.Array:
        return ours.compute_loss(ours(**numpy(given), params=params), **numpy(wanted))

    value, tree = loss(ours.params)
    # A loss is a mean of differences of logits, whose own states may be larger.
    with torch.no_grad():
        states = theirs(**given, output_hidden_states=True)
    assert_close("losses", value, total, rounding(theirs.spec, states))
    grads = canonical_tensors(theirs, gradients=True)
    assert jax.tree.structure(tree) == jax.tree.structure(ours.params)
    for canonical, gradient in canonical_of(tree, ours).items():
        own = grads.get(canonical)
        own = torch.zeros(gradient.shape) if own is None else own  # of images, where none came
        bound = GRADIENT * max(1.0, float(own.abs().max()))
        assert_close(f"gradients of {name}: {canonical}", gradient, own, bound)
    assert any(float(np.abs(x).max()) > 1e-3 for x in jax.tree.leaves(tree))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no window": ("MistralForCausalLM", {"sliding_window": None}),
    "a window in some layers": (
        "MistralForCausalLM",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
    ),
    "theta and head_dim": (
        "MistralForCausalLM",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
            "head_dim": 14,
            "sliding_window": 5,
        },
    ),
    "yarn": (
        "MistralForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 3.0,
                "original_max_position_embeddings": 12,
            },
            "sliding_window": None,
        },
    ),
    "dynamic": (
        "MistralForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 500.0,
                "factor": 2.0,
                "original_max_position_embeddings": 8,
            },
            "max_position_embeddings": 8,
        },
    ),
    "three heads, one group": ("MistralForCausalLM", {"num_attention_heads": 3, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    """The fields that the hub's old Flax class ignored."""
    name, more = VARIANTS[variant]
    theirs, ours = pair(name, tmp_path, **more)
    for padding in ("none", "left"):
        given = inputs(name, padding)
        with torch.no_grad():
            expected = theirs(**given, output_hidden_states=True, use_cache=False)
        found = ours(**numpy(given), output_hidden_states=True)
        bound = rounding(theirs.spec, expected)
        compare(f"{variant}, {padding}", found, expected, given.get("attention_mask"), bound)


def test_images(tmp_path: Path) -> None:
    theirs, ours = pair("FuyuForCausalLM", tmp_path)
    ids, mask, patches, places = tiny_families.with_images((4, 7, 2))
    with torch.no_grad():
        expected = theirs(
            ids,
            attention_mask=mask,
            image_patches=patches,
            image_patches_indices=places,
            output_hidden_states=True,
        )
    bound = rounding(theirs.spec, expected)
    found = ours(
        ids.numpy(),
        attention_mask=mask.numpy(),
        image_patches=[one.numpy() for one in patches],
        image_patches_indices=places.numpy(),
    )
    assert_close("images", found.logits, expected.logits, bound, mask)
    in_order = ours(
        ids.numpy(),
        attention_mask=mask.numpy(),
        image_patches=np.concatenate([one.numpy() for one in patches]),
    )
    assert_close("images in order", in_order.logits, expected.logits, bound, mask)
    without = ours(ids.numpy(), attention_mask=mask.numpy())
    assert float(jnp.abs(without.logits - found.logits).max()) > 1e-2


@pytest.mark.parametrize("name", ["OpenAIGPTModel", "MPNetModel", "GPTNeoModel", "MistralModel", "MptModel"])
def test_embeddings_as_inputs(name: str, tmp_path: Path) -> None:
    """`inputs_embeds` in place of ids, with positions of one's own, and GPT-1's token types."""
    theirs, ours = pair(name, tmp_path)
    given = inputs(name, "none")
    embeds = theirs.get_input_embeddings()(given.pop("input_ids")).detach()
    more: dict[str, torch.Tensor] = {"inputs_embeds": embeds}
    if name not in ("MptModel",):
        more["position_ids"] = torch.arange(3, 26)[None]
    if name == "OpenAIGPTModel":
        more["token_type_ids"] = torch.arange(69).reshape(3, 23) % 5
    with torch.no_grad():
        expected = theirs(**more, output_hidden_states=True)
    found = ours(**numpy(more)).last_hidden_state
    bound = rounding(theirs.spec, expected)
    assert_close(f"{name}, embeddings", found, expected.last_hidden_state, bound)


@pytest.mark.parametrize("name", ["MptForSequenceClassification", "OpenAIGPTForSequenceClassification"])
def test_the_last_token_of_a_row(name: str, tmp_path: Path) -> None:
    """With pad == eos, a final eos; by the pad id and by the mask, which the config says at each call."""
    last_token_checks.check(
        *pair(name, tmp_path, last_token_by="attention_mask"), inputs(name, "right"), numpy
    )
