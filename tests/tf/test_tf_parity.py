"""The whole matrix of TF classes equals the PyTorch backend on the same checkpoint: hidden states, attentions, logits,
losses and the gradients of all weights, padded and not, past the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpt_cases
import numpy as np
import pytest
import tensorflow as tf
import tiny_families
import torch
from helpers import chunks
from measure import assert_close
from tf_pairs import CLASSES, close, file_gradients, inputs, labels, numpy, pair, rounding_bound, tf_copy

GRADIENT = 5e-5  # of the largest of a parameter's gradients, or of 1


def compare(what: str, ours: Any, theirs: Any, mask: torch.Tensor | None, bound: float) -> None:
    """All outputs, at the tokens that are no padding."""
    found = {key for key in theirs if key not in ("loss", "mc_loss", "past_key_values")}
    assert set(ours.keys()) == found, what
    for key in found - {"hidden_states", "attentions"}:
        token = theirs[key].shape[: mask.dim()] == mask.shape if mask is not None else False
        close(f"{what}: {key}", ours[key], theirs[key], bound, mask if token else None)
    rows = None if mask is None else mask.flatten(0, -2)
    for key in found & {"hidden_states", "attentions"}:
        assert len(ours[key]) == len(theirs[key])
        for a, b in zip(ours[key], theirs[key], strict=True):
            swapped = (np.swapaxes(a, 1, 2), b.transpose(1, 2)) if key == "attentions" else (a, b)
            close(f"{what}: {key}", *swapped, bound, rows)


@pytest.mark.parametrize("name", CLASSES)
def test_outputs(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    more: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    if theirs.spec.causal:
        more["use_cache"] = False
    for padding in ("none", "right") if name.startswith("MPNet") else ("none", "left", "right"):
        given = inputs(name, padding)
        mask = given.get("attention_mask")
        with torch.no_grad():
            expected = theirs(**given, **more)
        bound = rounding_bound(theirs, expected)
        compare(f"{name}, {padding}", ours(**numpy(given), **more), expected, mask, bound)
        plain = ours(**numpy(given), use_cache=False)
        for key in plain:
            tokens = mask if mask is not None and expected[key].shape[: mask.dim()] == mask.shape else None
            close(f"{name}, {padding}, fused: {key}", plain[key], expected[key], bound, tokens)


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("Model") or "Double" in name])
def test_losses_and_gradients(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    given = inputs(name, "right" if name.startswith("MPNet") else "left")
    wanted = labels(name, given)
    expected = theirs(**given, **wanted)
    total = expected.loss + (expected.get("mc_loss") or 0)
    total.backward()
    with tf.GradientTape() as tape:
        out = ours(**numpy(given), **numpy(wanted))
        value = tf.reduce_mean(out.loss) + tf.reduce_mean(out.get("mc_loss", 0.0))
    by_row = theirs.row.head in ("sequence", "first", "choice", "span")
    assert out.loss.shape == ((len(given["input_ids"]),) if by_row else (1,))
    # A loss is a mean of differences of logits, whose own states may be larger.
    with torch.no_grad():
        states = theirs(**given, output_hidden_states=True)
    assert_close("losses", value, total.detach(), rounding_bound(theirs, states))
    gradients = file_gradients(ours, tape.gradient(value, ours.trainable_variables))
    grads = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    assert set(gradients) == set(grads)
    for key, gradient in gradients.items():
        own = grads[key]
        assert_close(
            f"gradients of {name}: {key}", gradient, own, GRADIENT * max(1.0, float(own.abs().max()))
        )
    assert any(np.abs(x).max() > 1e-3 for x in gradients.values())


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 12}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "a window in some layers": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
    },
    "theta, head_dim": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "head_dim": 14},
    "yarn": {"rope_parameters": YARN, "sliding_window": None},
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 8},
    "three heads, one group": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    """The fields that the hub's old TF class ignored, and scaled rotary positions, cached too."""
    theirs, ours = pair("MistralForCausalLM", tmp_path, **VARIANTS[variant])
    for padding in ("none", "left"):
        given = inputs("MistralForCausalLM", padding)
        with torch.no_grad():
            expected = theirs(**given, output_hidden_states=True, use_cache=False)
        found = ours(**numpy(given), output_hidden_states=True, use_cache=False)
        bound = rounding_bound(theirs, expected)
        compare(f"{variant}, {padding}", found, expected, given.get("attention_mask"), bound)
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        with torch.no_grad():
            expected = chunks(theirs, given["input_ids"], mask, PIECES)
        close(
            f"{variant}, {padding}, cached", pieces_of(ours, given["input_ids"], mask), expected, bound, mask
        )


PIECES = (17, 1, 5)


def pieces_of(ours: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Logits of a text given piece by piece, each with the cache of the last, as tuples."""
    start, past, logits = 0, None, []
    for size in PIECES:
        stop = start + size
        seen = mask[:, :stop].numpy()
        out = ours(ids[:, start:stop].numpy(), attention_mask=seen, past_key_values=past, use_cache=True)
        past, start = out.past_key_values, stop
        assert isinstance(past, tuple)
        assert past[0][0].shape[2] == stop
        logits.append(out.logits)
    return tf.concat(logits, axis=1)


@pytest.mark.parametrize("case", mpt_cases.CASES)
def test_options(case: str, tmp_path: Path) -> None:
    """Every option of the block, singly and all at once."""
    theirs = mpt_cases.mpt_model(case)
    ours = tf_copy(theirs, tmp_path)
    given = inputs("MptForCausalLM", "left")
    with torch.no_grad():
        expected = theirs(**given, use_cache=False, output_hidden_states=True)
    found = ours(**numpy(given), use_cache=False).logits
    close(
        f"options: {case}", found, expected.logits, rounding_bound(theirs, expected), given["attention_mask"]
    )


def test_segments(tmp_path: Path) -> None:
    """Packed rows."""
    theirs = mpt_cases.model(attn={"attn_uses_sequence_id": True})
    ours = tf_copy(theirs, tmp_path)
    ids = inputs("MptForCausalLM")["input_ids"]
    segments = (torch.arange(ids.shape[1]) // 6).expand(ids.shape)
    with torch.no_grad():
        expected = theirs(ids, sequence_id=segments, output_hidden_states=True)
    found = ours(ids.numpy(), sequence_id=segments.numpy()).logits
    close("segments", found, expected.logits, rounding_bound(theirs, expected))
    assert np.abs(ours(ids.numpy()).logits - found).max() > 1e-2
    with pytest.raises(ValueError, match="training needs sequence_id"):
        ours(ids.numpy(), training=True)


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
    bound = rounding_bound(theirs, expected)
    own = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    found = ours(
        **own, image_patches=[one.numpy() for one in patches], image_patches_indices=places.numpy()
    ).logits
    close("images", found, expected.logits, bound, mask)
    in_order = ours(**own, image_patches=np.concatenate([one.numpy() for one in patches])).logits
    close("images in order", in_order, expected.logits, bound, mask)
    batched = np.zeros((3, 7, tiny_families.PATCH_SIZE), np.float32)
    for row, one in zip(batched, patches, strict=True):
        row[: len(one)] = one
    again = ours(**own, image_patches=batched, image_patches_indices=places.numpy()).logits
    close("images in a batch", again, expected.logits, bound, mask)
    assert np.abs(ours(**own).logits - found).max() > 1e-2
    with pytest.raises(ValueError, match="13 tokens of the id"):
        ours(**own, image_patches=np.zeros((5, tiny_families.PATCH_SIZE), np.float32))


@pytest.mark.parametrize("name", ["OpenAIGPTModel", "MPNetModel", "GPTNeoModel", "MistralModel", "MptModel"])
def test_embeddings_as_inputs(name: str, tmp_path: Path) -> None:
    """`inputs_embeds` in place of ids, with positions of one's own, head masks, and GPT-1's token types."""
    theirs, ours = pair(name, tmp_path)
    embeds = theirs.get_input_embeddings()(inputs(name)["input_ids"]).detach()
    more: dict[str, torch.Tensor] = {"inputs_embeds": embeds}
    if name != "MptModel":
        more["position_ids"] = torch.arange(3, 26)[None]
    if name == "OpenAIGPTModel":
        more["token_type_ids"] = torch.arange(69).reshape(3, 23) % 5
    if name in ("OpenAIGPTModel", "MPNetModel", "GPTNeoModel"):
        more["head_mask"] = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(**more, output_attentions=True, output_hidden_states=True)
    bound = rounding_bound(theirs, expected)
    found = ours(**numpy(more), output_attentions=True)
    close(f"{name}, embeddings", found.last_hidden_state, expected.last_hidden_state, bound)
    close(f"{name}, embeddings", found.attentions[1], expected.attentions[1], bound)


ONE_LAYER: dict[str, dict[str, Any]] = {
    "MptForCausalLM": {"n_layers": 1},
    "MPNetForMaskedLM": {
        "num_hidden_layers": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "GPTNeoForCausalLM": {
        "num_layers": 1,
        "attention_types": [[["local"], 1]],
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    },
}


# Names of matrices to which all of an attention's gradients come.
WATCHED = (".Wqkv.weight", ".k_proj.weight", ".attn.k.weight", ".c_attn.weight", ".query_key_value.weight")


@pytest.mark.parametrize("name", ONE_LAYER)
def test_blocks_of_queries(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several blocks, written out and in a loop, known and open lengths, at rest and in training, compiled."""
    from monoblock.backends.tf import attention

    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    theirs, ours = pair(name, tmp_path, **ONE_LAYER[name])
    given = inputs(name, "right" if name.startswith("MPNet") else "left")
    ids, mask = given["input_ids"], given["attention_mask"]
    wanted = labels(name, given)["labels"]
    expected = theirs(**given, labels=wanted)
    expected.loss.backward()
    watched = next(key for key, p in theirs.named_parameters() if p.dim() == 2 and key.endswith(WATCHED))
    gradient, slot = theirs.get_parameter(watched).grad, ours.stored_variables()[watched]
    spec = tf.TensorSpec((None, None), tf.int64)

    def step(ids: Any, mask: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            out = ours(ids, attention_mask=mask, labels=labels, training=True)
        return out.logits, tape.gradient(out.loss, slot.variable.value)

    arrays = (ids.numpy(), mask.numpy(), wanted.numpy())
    known = tf.function(step, jit_compile=True, autograph=False)
    open_ = tf.function(step, input_signature=[spec] * 3, autograph=False)
    for unrolled in (16, 0):
        monkeypatch.setattr(attention, "UNROLLED", unrolled)
        runs = {"eager": step} if unrolled else {"compiled": known, "open": open_}
        for what, run in runs.items():
            logits, found = run(*(tf.constant(x) for x in arrays))
            close(f"{name} in blocks, {what}", logits, expected.logits, 5e-5, mask)
            assert_close(f"{name} in blocks, {what}: gradient", slot.laid(found.numpy()), gradient, 5e-5)
