"""Generation and caches of every family: tokens with growing, rolling and static caches and without one; dropout and
gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import chunks, one_by_one
from helpers import model as mpt
from measure import assert_close
from tiny_families import (
    CLASSES,
    FAMILY_NAMES,
    GENERATING,
    KIND,
    LEARNED,
    PADS,
    VOCAB,
    fields,
    labels_of,
    logits_of,
    model_inputs,
    model_pair,
    monoblock_model,
    with_images,
)

from monoblock import DynamicCache, StaticCache

ATOL = 2e-5  # fp32; the fused kernels sum in a different order for one query than for many
MPT = "MptForCausalLM"
NEW = 41  # tokens: several windows beyond the prompt
WINDOW = {"MistralForCausalLM": 9, "GPTNeoForCausalLM": 7, MPT: 6}


def made(name: str, **more: Any) -> Any:
    if name == MPT:
        return mpt(MPT, {"sliding_window_size": 5}, **more)
    return monoblock_model(name, **fields(CLASSES[name], **more))


def prompts(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = model_inputs("MistralForCausalLM" if name == MPT else name, "left")
    assert mask is not None
    return ids, mask


OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
# Small random models soon repeat one token, which would hide a wrong cache.
VARIED: dict[str, Any] = {**OPTIONS, "no_repeat_ngram_size": 2}


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", [MPT, *GENERATING])
def test_tokens_with_every_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "SLACK", 4)  # windowed layers drop tokens within these lengths
    model = made(name)
    ids, mask = prompts(name)
    out = model.generate(ids, attention_mask=mask, **VARIED, return_dict_in_generate=True)
    rolling, cache = out.sequences, out.past_key_values
    assert rolling.shape == (3, ids.shape[1] + NEW)
    assert len(rolling[:, ids.shape[1] :].unique()) > 10, "varied tokens"
    windows = [window for window in model.spec.windows if window]
    assert bool(windows) == (name in WINDOW)
    for i, window in enumerate(model.spec.windows):
        if window is not None:
            assert cache.get_seq_length(i) == ids.shape[1] + NEW - 1 > 4 * window
            assert cache.held(i) < cache.get_seq_length(i), "windowed layers drop keys"
    others = {
        "none": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "growing": {"past_key_values": DynamicCache()},
        "rolling": {"past_key_values": DynamicCache(config=model.config)},
        "given static": {"past_key_values": StaticCache(max_cache_len=80)},
    }
    for how, given in others.items():
        assert torch.equal(model.generate(ids, attention_mask=mask, **VARIED, **given), rolling), how
    for row, real in enumerate(mask == 1):
        alone = model.generate(ids[row, real][None], **VARIED)
        assert torch.equal(alone[0, -NEW:], rolling[row, -NEW:]), "alone"


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens_are_transformers(name: str) -> None:
    theirs, ours = model_pair(name, **fields(CLASSES[name]))
    ids, mask = prompts(name)
    options = {"max_new_tokens": 36, "min_new_tokens": 36, "do_sample": False}
    rows = [(ids, mask)]
    if CLASSES[name] == "openai-gpt":  # transformers counts padding as positions
        rows = [(ids[row, real][None], None) for row, real in enumerate(mask == 1)]
    for tokens, real in rows:
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens) if real is None else real, **options
        )
        assert torch.equal(ours.generate(tokens, attention_mask=real, **options), expected)


@pytest.mark.parametrize("name", [n for n in GENERATING if CLASSES[n] in LEARNED])
@torch.no_grad()
def test_new_tokens_have_the_token_type_of_the_last(name: str) -> None:
    model = made(name)
    ids, mask = prompts(name)
    types = (ids * 3) % VOCAB
    found = model.generate(ids, attention_mask=mask, token_type_ids=types, **{**OPTIONS, "max_new_tokens": 8})
    uncached = model.generate(
        ids, attention_mask=mask, token_type_ids=types, use_cache=False, **{**OPTIONS, "max_new_tokens": 8}
    )
    assert torch.equal(found, uncached)
    for _ in range(8):
        logits = model(ids, attention_mask=mask, token_type_ids=types).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        types, mask = torch.cat((types, types[:, -1:]), 1), torch.cat((mask, mask[:, -1:]), 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM"])
def test_given_positions_are_continued(name: str, cached: bool) -> None:
    """The positions of new tokens follow the given ones."""
    model = made(name)
    ids, _ = model_inputs(name, "none")
    positions = (torch.arange(ids.shape[1]) + 5).expand(3, -1)
    found = model.generate(ids, position_ids=positions, use_cache=cached, **{**OPTIONS, "max_new_tokens": 6})
    for _ in range(6):
        logits = model(ids, position_ids=positions).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        positions = torch.cat((positions, positions[:, -1:] + 1), 1)
    assert torch.equal(found, ids)


def test_unsupported_model_inputs_raise() -> None:
    ids, _ = prompts("MistralForCausalLM")
    for name, given in (("MistralForCausalLM", "token_type_ids"), ("GPTNeoForCausalLM", "pixel_values")):
        with pytest.raises(ValueError, match=given):
            made(name).generate(ids, **{given: ids}, max_new_tokens=2)


# ---------------------------------------------------------------------------- images


def test_images_through_generate() -> None:
    theirs, model = model_pair("FuyuForCausalLM", **fields("fuyu"))
    ids, mask, patches, positions = with_images((6, 0, 9))
    options = {"attention_mask": mask, **OPTIONS, "max_new_tokens": 12}
    images = {"image_patches": patches, "image_patches_indices": positions}
    found = model.generate(ids, **images, **options)
    assert not torch.equal(found, model.generate(ids, **options)), "the images must have an effect"
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **images, **options, **how), found)
    assert torch.equal(model.generate(ids, pixel_values=torch.cat(patches), **options), found)
    batch = {"input_ids": ids, "attention_mask": mask, **images}
    assert torch.equal(model.generate(**batch, **OPTIONS | {"max_new_tokens": 12}), found), (
        "as keyword arguments"
    )
    expected = theirs.generate(ids, pixel_values=torch.cat(patches), **{**options, "eos_token_id": -1})
    assert torch.equal(found, expected)
    for row, real in enumerate(mask == 1):
        own = {"image_patches": [patches[row]], "image_patches_indices": positions[row, real][None]}
        alone = model.generate(ids[row, real][None], **own, **OPTIONS | {"max_new_tokens": 12})
        assert torch.equal(alone[0, -12:], found[row, -12:])


def test_sampled_copies_of_a_prompt_with_an_image() -> None:
    model = made("FuyuForCausalLM")
    ids, mask, patches, positions = with_images((6, 3))
    images = {"image_patches": patches, "image_patches_indices": positions}
    options = {
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 5,
        "seed": 0,
        "eos_token_id": None,
    }
    out = model.generate(ids, attention_mask=mask, **images, **options)
    assert out.shape == (6, ids.shape[1] + 5)
    uncached = model.generate(ids, attention_mask=mask, **images, **options, use_cache=False)
    assert torch.equal(out, uncached)


# ---------------------------------------------------------------------------- caches


@pytest.mark.parametrize("sizes", [(5, 9, 1, 8), (12, *[1] * 11), (1,) * 23], ids=["chunks", "steps", "ones"])
@pytest.mark.parametrize("name", [MPT, *GENERATING])
@torch.no_grad()
def test_chunks_with_a_cache_equal_one_pass(
    name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "SLACK", 0)
    model = made(name)
    for padding in ("left", "right", "none"):
        ids, mask = model_inputs("MistralForCausalLM" if name == MPT else name, padding)
        whole = model(ids, attention_mask=mask).logits
        for past in (None, DynamicCache(), DynamicCache(config=model.config), StaticCache(max_cache_len=23)):
            assert_close(f"{name} in chunks", chunks(model, ids, mask, sizes, past), whole, ATOL, mask)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM", MPT])
@torch.no_grad()
def test_a_windowed_layer_keeps_its_window(name: str) -> None:
    """600 tokens one by one: the cache does not grow with them, and the logits are unchanged."""
    size = {"max_position_embeddings": 640} if name != MPT else {"max_seq_len": 640}
    model = made(name, **size)
    ids = torch.randint(10, VOCAB, (1, 600), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    past = DynamicCache(config=model.config)
    sizes = one_by_one(600, 150)
    assert_close(f"{name}, 600 tokens", chunks(model, ids, None, sizes, past), whole, ATOL)
    for i, window in enumerate(model.spec.windows):
        assert past.get_seq_length(i) == 600
        room = past.keys[i].untyped_storage().nbytes() // (
            past.keys[i].element_size() * past.keys[i][:, :, 0].numel()
        )
        if window is None:
            assert past.held(i) == 600
        else:
            kept = window - 1 + DynamicCache.SLACK
            assert past.held(i) <= 2 * kept
            assert room <= 3 * kept, "memory of keys outside every window"


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM"])
@torch.no_grad()
def test_crop_of_a_rolling_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "SLACK", 6)
    model = made(name)
    ids = torch.randint(10, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    past = DynamicCache(config=model.config)
    chunks(model, ids[:, :50], None, one_by_one(50, 20), past)
    wrong = torch.randint(10, VOCAB, (2, 4), generator=torch.Generator().manual_seed(1))
    model(wrong, past_key_values=past, use_cache=True)
    past.crop(50)  # removes the four tokens
    assert past.get_seq_length() == 50
    assert_close(
        "after crop", model(ids[:, 50:], past_key_values=past, use_cache=True).logits, whole[:, 50:], ATOL
    )
    past.crop(-5)
    assert past.get_seq_length() == 55
    assert_close(
        "after crop", model(ids[:, 55:], past_key_values=past, use_cache=True).logits, whole[:, 55:], ATOL
    )
    with pytest.raises(
        ValueError, match=r"a windowed layer has dropped the first \d+ tokens: it cannot go back to 10"
    ):
        past.crop(10)
    assert past.get_seq_length() == 60, "a failed crop changes nothing"
    past.reset()
    assert past.get_seq_length() == 0
    assert_close("after reset", model(ids, past_key_values=past, use_cache=True).logits, whole, ATOL)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM"])
@torch.no_grad()
def test_tuples_as_caches(name: str) -> None:
    model = made(name)
    ids, mask = prompts(name)
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :15], attention_mask=mask[:, :15], past_key_values=DynamicCache(), use_cache=True)
    old = first.past_key_values.to_legacy_cache()
    out = model(ids[:, 15:], attention_mask=mask, past_key_values=old, use_cache=True)
    assert type(out.past_key_values) is tuple
    assert out.past_key_values[0][0].shape[2] == 23
    assert_close("tuples", out.logits, whole[:, 15:], ATOL, mask[:, 15:])


@torch.no_grad()
def test_cached_keys_equal_transformers() -> None:
    for name in ("MistralForCausalLM", "GPTNeoForCausalLM", "FuyuForCausalLM"):
        theirs, ours = model_pair(name, **fields(CLASSES[name]))
        ids, _ = model_inputs(name, "none")
        found = ours(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        expected = theirs(ids, past_key_values=transformers.DynamicCache(), use_cache=True).past_key_values
        for (k, v), layer in zip(found, expected.layers, strict=True):
            assert_close("cached keys", k, layer.keys, ATOL)
            assert_close("cached values", v, layer.values, ATOL)


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", [n for n in CLASSES if KIND[n] not in (None, "pooler")])
def test_gradient_checkpointing_keeps_the_gradients(name: str) -> None:
    """With dropout, whose masks must be the same in the recomputation."""
    model = made(name).train()
    ids, mask = model_inputs(name, "left")
    grads = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(5)
        out = model(ids, attention_mask=mask, **labels_of(name, ids, mask))
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
        with_cache = model(ids, attention_mask=mask)
        assert "past_key_values" not in with_cache, "no cache with gradient checkpointing"
    assert len(grads[0]) > 10
    for key, grad in grads[0].items():
        assert torch.equal(grads[1][key], grad), key
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_dropout_is_active_in_training_only(model_type: str) -> None:
    dropouts = {
        "mistral": {"attention_dropout": 0.5},
        "fuyu": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
        "openai-gpt": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "gpt_neo": {"attention_dropout": 0.5, "resid_dropout": 0.5, "embed_dropout": 0.5},
        "mpnet": {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5},
    }
    name = next(n for n in CLASSES if CLASSES[n] == model_type)
    ids, mask = model_inputs(name, "left")
    none = dict.fromkeys(dropouts[model_type], 0.0)
    plain = made(name, **none).eval()
    expected = logits_of(plain(ids, attention_mask=mask))
    for field in dropouts[model_type]:
        model = made(name, **{**none, field: 0.5}).eval()
        assert torch.equal(logits_of(model(ids, attention_mask=mask)), expected)
        model.train()
        first, second = (logits_of(model(ids, attention_mask=mask)) for _ in range(2))
        assert not torch.allclose(first, second), field
        assert not torch.allclose(first, expected), field
    assert PADS[model_type] in ids
