"""The forward pass and gradients of every TF class: the contract; caches as tuples, MPT's options, packed sequences,
batched images, and attention by blocks of queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import mpt_cases
import numpy as np
import pytest
import tensorflow as tf
import tiny_families
import torch
from contract.models import inputs, labels, numpy
from contract.parity import VARIANTS, ParityContract
from helpers import chunks
from measure import assert_close
from tf_pairs import close, file_gradients, pair, rounding_bound, tf_copy


class TestParity(ParityContract):
    prefix = "TF"
    without_cache: ClassVar = {"use_cache": False}
    head_masks = True
    all_forms = True

    def loss_and_gradients(self, ours: Any, given: Any, wanted: Any) -> tuple[Any, dict[str, np.ndarray]]:
        with tf.GradientTape() as tape:
            out = ours(**given, **wanted)
            value = tf.reduce_mean(out.loss) + tf.reduce_mean(out.get("mc_loss", 0.0))
        by_row = ours.row.head in ("sequence", "first", "choice", "span")
        assert out.loss.shape == ((len(given["input_ids"]),) if by_row else (1,))
        return value, file_gradients(ours, tape.gradient(value, ours.trainable_variables))

    def torch_gradients(self, theirs: Any) -> dict[str, torch.Tensor]:
        return {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}


CHUNKS = (17, 1, 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_with_a_cache(variant: str, tmp_path: Path) -> None:
    """Logits of prompts fed in chunks, each with the cache of the last, as tuples."""
    theirs, ours = pair("MistralForCausalLM", tmp_path, **VARIANTS[variant])
    for padding in ("none", "left"):
        given = inputs("MistralForCausalLM", padding)
        ids, mask = given["input_ids"], given.get("attention_mask", torch.ones_like(given["input_ids"]))
        with torch.no_grad():
            bound = rounding_bound(theirs, theirs(**given, output_hidden_states=True))
            expected = chunks(theirs, ids, mask, CHUNKS)
        start, past, logits = 0, None, []
        for size in CHUNKS:
            stop = start + size
            call = {"attention_mask": mask[:, :stop].numpy(), "past_key_values": past, "use_cache": True}
            out = ours(ids[:, start:stop].numpy(), **call)
            past, start = out.past_key_values, stop
            assert isinstance(past, tuple)
            assert past[0][0].shape[2] == stop
            logits.append(out.logits)
        close(f"{variant}, {padding}, cached", tf.concat(logits, axis=1), expected, bound, mask)


@pytest.mark.parametrize("case", mpt_cases.CASES)
def test_mpt_options(case: str, tmp_path: Path) -> None:
    """Every option of the block, alone and all together."""
    theirs = mpt_cases.mpt_model(case)
    ours = tf_copy(theirs, tmp_path)
    given = inputs("MptForCausalLM", "left")
    with torch.no_grad():
        expected = theirs(**given, use_cache=False, output_hidden_states=True)
    found = ours(**numpy(given), use_cache=False).logits
    close(
        f"options: {case}", found, expected.logits, rounding_bound(theirs, expected), given["attention_mask"]
    )


def test_packed_documents_by_sequence_id(tmp_path: Path) -> None:
    """`sequence_id` separates the documents of a packed row."""
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


def test_batched_images(tmp_path: Path) -> None:
    """`image_patches` as one padded array; too few patches raise."""
    _, ours = pair("FuyuForCausalLM", tmp_path)
    ids, mask, patches, indices = tiny_families.with_images((4, 7, 2))
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    batched = np.zeros((3, 7, tiny_families.PATCH_SIZE), np.float32)
    for row, one in zip(batched, patches, strict=True):
        row[: len(one)] = one
    expected = ours(
        **given, image_patches=[one.numpy() for one in patches], image_patches_indices=indices.numpy()
    ).logits
    found = ours(**given, image_patches=batched, image_patches_indices=indices.numpy()).logits
    assert_close("images in a batch", found, expected, 1e-5, mask)  # fp32, logits of 2
    with pytest.raises(ValueError, match="13 tokens of the id"):
        ours(**given, image_patches=np.zeros((5, tiny_families.PATCH_SIZE), np.float32))


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


# Names of matrices whose gradients depend on all of an attention's.
WATCHED = (".Wqkv.weight", ".k_proj.weight", ".attn.k.weight", ".c_attn.weight", ".query_key_value.weight")


@pytest.mark.parametrize("name", ONE_LAYER)
def test_blocks_of_queries(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of several blocks: unrolled and in a loop, of static and dynamic lengths, in training, compiled."""
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
    static = tf.function(step, jit_compile=True, autograph=False)
    dynamic = tf.function(step, input_signature=[spec] * 3, autograph=False)
    for unrolled in (16, 0):
        monkeypatch.setattr(attention, "UNROLLED", unrolled)
        runs = {"eager": step} if unrolled else {"compiled": static, "dynamic": dynamic}
        for what, run in runs.items():
            logits, found = run(*(tf.constant(x) for x in arrays))
            close(f"{name} in blocks, {what}", logits, expected.logits, 5e-5, mask)
            assert_close(f"{name} in blocks, {what}: gradient", slot.convert(found.numpy()), gradient, 5e-5)
