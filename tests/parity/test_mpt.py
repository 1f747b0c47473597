"""MPT against transformers, beyond test_families.py: every form of cache, greedy tokens, positional arguments, error
messages, and the last token of a row by the definition in tests/oracle.py."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import transformers
from helpers import CLASSES, KIND, PAD, PADDINGS, batch, chunks, one_by_one, parameters
from measure import assert_close
from tiny_families import TOKENS, VOCAB, fields, logits_of, pair

from monoblock import DynamicCache, StaticCache

ATOL = 1e-5  # fp32, values of 1 to 10; measured 6e-6

# ---------------------------------------------------------------------------- caches


def legacy(cache: Any) -> Any:
    return cache.to_legacy_cache()


def folded(cache: Any) -> Any:
    """The form of older pages: keys (batch * heads, head_dim, tokens), values (batch * heads, tokens, head_dim)."""
    return tuple((k.flatten(0, 1).mT, v.flatten(0, 1)) for k, v in cache.to_legacy_cache())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "sizes", [one_by_one(TOKENS, 18), (5, 9, 1, 8), (1,) * TOKENS], ids=["steps", "chunks", "ones"]
)
@pytest.mark.parametrize("kind", ["dynamic", "static", "heads", "folded"])
@torch.no_grad()
def test_cached_runs(kind: str, sizes: tuple[int, ...], padding: str) -> None:
    theirs, ours = pair("MptForCausalLM", 3)
    ids, mask = batch(padding)
    expected = theirs(ids, attention_mask=mask).logits
    past = StaticCache(max_cache_len=TOKENS) if kind == "static" else DynamicCache()
    if kind in ("heads", "folded"):
        first, rest = sizes[0], sizes[1:]
        out = ours(ids[:, :first], attention_mask=None if mask is None else mask[:, :first], use_cache=True)
        past = (legacy if kind == "heads" else folded)(out.past_key_values)
        logits = [out.logits]
        for size in rest:
            stop = first + size
            visible = None if mask is None else mask[:, :stop]
            out = ours(ids[:, first:stop], attention_mask=visible, past_key_values=past, use_cache=True)
            assert type(out.past_key_values) is tuple, "the form that was given"
            assert [k.shape[0] for k, _ in out.past_key_values] == [k.shape[0] for k, _ in past]
            past, first = out.past_key_values, stop
            logits.append(out.logits)
        logits = torch.cat(logits, 1)
    else:
        logits = chunks(ours, ids, mask, sizes, past)
        assert past.get_seq_length() == TOKENS
    assert_close(f"logits, {kind} cache", logits, expected, ATOL, mask)


@torch.no_grad()
def test_cached_tensors_are_transformers() -> None:
    theirs, ours = pair("MptForCausalLM")
    ids, mask = batch("left")
    a = ours(ids, attention_mask=mask, use_cache=True).past_key_values
    b = theirs(ids, attention_mask=mask, use_cache=True).past_key_values
    for (k, v), layer in zip(a, b.layers, strict=True):
        assert_close("cached keys", k.transpose(1, 2), layer.keys.transpose(1, 2), ATOL, mask)
        assert_close("cached values", v.transpose(1, 2), layer.values.transpose(1, 2), ATOL, mask)


@torch.no_grad()
def test_cached_attentions_and_states() -> None:
    theirs, ours = pair("MptModel")
    ids, mask = batch("left")
    flags = {"output_attentions": True, "output_hidden_states": True}
    outs = []
    for module in (ours, theirs):
        past = module(ids[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
        outs.append(module(ids[:, 15:], attention_mask=mask, past_key_values=past, **flags))
    for a, b in zip(outs[0].attentions, outs[1].attentions, strict=True):
        assert a.shape == (3, 6, 8, TOKENS)
        assert_close("cached attentions", a.transpose(1, 2), b.transpose(1, 2), ATOL, mask[:, 15:])
    for a, b in zip(outs[0].hidden_states, outs[1].hidden_states, strict=True):
        assert_close("cached hidden states", a, b, ATOL, mask[:, 15:])


# ---------------------------------------------------------------------------- greedy tokens


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("heads", [3, 6, 8])
def test_greedy_tokens(heads: int, padding: str) -> None:
    theirs, ours = pair("MptForCausalLM", heads)
    ids, mask = batch(padding)
    mask = torch.ones_like(ids) if mask is None else mask
    # min_new_tokens suppresses the eos in both.
    options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 4, "do_sample": False}
    expected = theirs.generate(ids, **options)
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(ours.generate(ids, **options, **how), expected), how
    scores = ours.generate(ids, **options, output_scores=True, return_dict_in_generate=True).scores
    theirs_scores = theirs.generate(ids, **options, output_scores=True, return_dict_in_generate=True).scores
    for a, b in zip(scores, theirs_scores, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite)
        assert_close("scores of generated tokens", a[finite], b[finite], ATOL)


def test_greedy_tokens_of_a_row_do_not_depend_on_the_batch() -> None:
    _, ours = pair("MptForCausalLM")
    ids, mask = batch("left")
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    together = ours.generate(ids, attention_mask=mask, **options)
    for row, (sequence, real) in enumerate(zip(ids, mask, strict=True)):
        alone = ours.generate(sequence[real == 1][None], **options)
        assert torch.equal(alone[0, -15:], together[row, -15:])


# ---------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments(name: str) -> None:
    theirs, ours = pair(name)
    ids, mask = batch("left")
    args = (ids, mask) if KIND[name] == "span" else (ids, None, mask)
    where = None if KIND[name] == "sequence" else mask
    assert_close("by position", logits_of(ours(*args)), logits_of(theirs(*args)), ATOL, where)


@pytest.mark.parametrize("name", CLASSES)
def test_error_messages_are_transformers(name: str) -> None:
    theirs, ours = pair(name)
    ids = torch.arange(10, 16)[None]
    wrong = [{}, {"input_ids": ids, "inputs_embeds": torch.zeros(1, 6, 36)}]
    for given in wrong:
        with pytest.raises(ValueError) as expected:
            theirs(**given)
        with pytest.raises(ValueError) as found:
            ours(**given)
        assert str(expected.value) in str(found.value)


# ---------------------------------------------------------------------------- by the definition


@pytest.mark.parametrize("by", ["pad_id", "attention_mask"])
@torch.no_grad()
def test_last_token_of_a_row(by: str) -> None:
    """With pad == eos: a final eos, a row of eos alone, and both without a mask."""
    _, ours = pair("MptForSequenceClassification")
    ours.config.last_token_by = by
    ids, mask = batch("right")
    ids[torch.arange(3), mask.sum(1) - 1] = PAD
    ids[2] = PAD
    for given in (mask, None):
        out = ours(ids, attention_mask=given, output_hidden_states=True)
        hidden = out.hidden_states[-1].double().numpy()
        masks = None if given is None else given.numpy()
        picked = oracle.pooled(hidden, ids.numpy(), masks, PAD, by)
        expected = oracle.logits(ours.spec, parameters(ours), picked, "sequence")
        assert_close("pooled logits", out.logits, expected, ATOL)
    ours.config.last_token_by = None


@torch.no_grad()
def test_embeddings_are_classified_at_the_last_unmasked_position() -> None:
    """transformers takes the last position, even if it is padding."""
    _, ours = pair("MptForSequenceClassification")
    ids, mask = batch("right")
    embeds = ours.get_input_embeddings()(ids)
    a, b = ours(inputs_embeds=embeds, attention_mask=mask), ours(ids, attention_mask=mask)
    assert_close("classified from embeddings", a.logits, b.logits, 1e-6)
    assert_close("last position", ours(inputs_embeds=embeds[:1]).logits, ours(ids[:1]).logits, 1e-6)


@torch.no_grad()
def test_longer_than_max_seq_len() -> None:
    """transformers' ALiBi table ends at max_seq_len, so a model with a longer table is the reference."""
    _, ours = pair("MptForCausalLM", 3)
    ids = torch.randint(PAD + 1, VOCAB, (1, 200), generator=torch.Generator().manual_seed(5))
    longer = transformers.MptForCausalLM(transformers.MptConfig(**fields("mpt", 3, max_seq_len=256))).eval()
    longer.load_state_dict(pair("MptForCausalLM", 3)[0].state_dict())
    assert ours.config.max_seq_len == 64
    assert_close("beyond max_seq_len", ours(ids).logits, longer(ids).logits, ATOL)
