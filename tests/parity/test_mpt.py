"""The five MPT classes against transformers', on tiny random models with a value of its own in every field that
transformers honours."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import transformers
from helpers import CLASSES, KIND, PAD, PADDINGS, batch, chunks, one_by_one, parameters
from measure import assert_close, rounding
from mpt_pairs import LABELLED, TOKENS, VOCAB, fields, logits_of, pair

import monoblock
from monoblock import DynamicCache, StaticCache

ATOL = 1e-5  # fp32; states and logits are of the order of 1 to 10, measured 6e-6 at most

# ---------------------------------------------------------------------------- forward


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("heads", [3, 6, 8])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_states_attentions_and_logits(name: str, heads: int, padding: str) -> None:
    theirs, ours = pair(name, heads)
    ids, mask = batch(padding)
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    bound = rounding(ours.spec, expected)
    # Compared at padding too: all kernels make the same of it, and a span's loss takes it in.
    for kernel in ("sdpa", "eager"):
        ours.set_attn_implementation(kernel)
        out = ours(ids, attention_mask=mask, output_hidden_states=True)
        assert_close(f"{name} logits, {kernel}", logits_of(out), logits_of(expected), bound)
        assert len(out.hidden_states) == len(expected.hidden_states) == 4
        for i, (a, b) in enumerate(zip(out.hidden_states, expected.hidden_states, strict=True)):
            assert_close(f"hidden state {i}, {kernel}", a, b, bound)
    ours.set_attn_implementation(None)
    out = ours(ids, attention_mask=mask, output_attentions=True)
    assert_close(f"{name} logits with attentions", logits_of(out), logits_of(expected), bound)
    assert len(out.attentions) == len(expected.attentions) == 3
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        assert_close("attentions", a, b, bound)


@torch.no_grad()
def test_untied_head() -> None:
    theirs, ours = pair("MptForCausalLM", tied=False)
    ids, mask = batch("left")
    assert ours.at("head_out").weight is not ours.get_input_embeddings().weight
    assert_close(
        "untied logits",
        ours(ids, attention_mask=mask).logits,
        theirs(ids, attention_mask=mask).logits,
        ATOL,
        mask,
    )


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_inputs_embeds(name: str) -> None:
    theirs, ours = pair(name)
    embeds = torch.randn(1, TOKENS, 36, generator=torch.Generator().manual_seed(3))
    a, b = ours(inputs_embeds=embeds), theirs(inputs_embeds=embeds)
    assert_close(f"{name} from embeddings", logits_of(a), logits_of(b), ATOL)


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 7, -1])], ids=["1", "5", "places"])
@torch.no_grad()
def test_logits_to_keep(keep: Any) -> None:
    theirs, ours = pair("MptForCausalLM")
    ids, _ = batch("none")
    assert_close(
        "logits_to_keep", ours(ids, logits_to_keep=keep).logits, theirs(ids, logits_to_keep=keep).logits, ATOL
    )


@torch.no_grad()
def test_a_row_is_classified_at_its_last_real_token() -> None:
    theirs, ours = pair("MptForSequenceClassification")
    ids, mask = batch("right")
    ids[0, 4] = PAD  # a pad id within the text
    expected = theirs(ids, attention_mask=mask).logits
    assert_close("classified by mask", ours(ids, attention_mask=mask).logits, expected, ATOL)
    alone, bare = ours(ids).logits, theirs(ids).logits  # no mask: the pad id tells where a row ends
    assert_close("classified by pad id", alone, bare, ATOL)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_half_precision_is_near(name: str) -> None:
    """bf16 has 8 bits: errors of 3 layers stay below 5 % of values of the order of 3."""
    theirs, ours = pair(name)
    ids, mask = batch("left")
    expected = logits_of(theirs(ids, attention_mask=mask))
    import copy

    half = copy.deepcopy(ours).to(torch.bfloat16)
    where = None if KIND[name] == "sequence" else mask
    assert_close("bf16 logits", logits_of(half(ids, attention_mask=mask)), expected, 0.3, where)


# ---------------------------------------------------------------------------- caches


def legacy(cache: Any) -> Any:
    return cache.to_legacy_cache()


def folded(cache: Any) -> Any:
    """The form of older pages: keys (batch * heads, head_dim, tokens), values (batch * heads, tokens, head_dim)."""
    return tuple((k.flatten(0, 1).mT, v.flatten(0, 1)) for k, v in cache.to_legacy_cache())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "sizes", [one_by_one(TOKENS, 18), (5, 9, 1, 8), (1,) * TOKENS], ids=["steps", "pieces", "ones"]
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
            seen = None if mask is None else mask[:, :stop]
            out = ours(ids[:, first:stop], attention_mask=seen, past_key_values=past, use_cache=True)
            assert type(out.past_key_values) is tuple, "what comes in is what goes out"
            assert [k.shape[0] for k, _ in out.past_key_values] == [k.shape[0] for k, _ in past]
            past, first = out.past_key_values, stop
            logits.append(out.logits)
        logits = torch.cat(logits, 1)
    else:
        logits = chunks(ours, ids, mask, sizes, past)
        assert past.get_seq_length() == TOKENS
    assert_close(f"logits, {kind} cache", logits, expected, ATOL, mask)


@torch.no_grad()
def test_cached_tensors_are_the_hubs() -> None:
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
    # min_new_tokens: eos counts, and must be held back equally.
    asked = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 4, "do_sample": False}
    expected = theirs.generate(ids, **asked)
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(ours.generate(ids, **asked, **how), expected), how
    scores = ours.generate(ids, **asked, output_scores=True, return_dict_in_generate=True).scores
    theirs_scores = theirs.generate(ids, **asked, output_scores=True, return_dict_in_generate=True).scores
    for a, b in zip(scores, theirs_scores, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite)
        assert_close("scores of generated tokens", a[finite], b[finite], ATOL)


def test_greedy_tokens_of_a_row_do_not_depend_on_the_batch() -> None:
    _, ours = pair("MptForCausalLM")
    ids, mask = batch("left")
    asked = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    together = ours.generate(ids, attention_mask=mask, **asked)
    for row, (text, real) in enumerate(zip(ids, mask, strict=True)):
        alone = ours.generate(text[real == 1][None], **asked)
        assert torch.equal(alone[0, -15:], together[row, -15:])


# ---------------------------------------------------------------------------- outputs


FLAGS = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize("name", CLASSES)
def test_output_types_and_fields(name: str) -> None:
    theirs, ours = pair(name)
    ids = torch.arange(10, 22).reshape(2, 6)
    cached = {} if KIND[name] == "span" else {"use_cache": True}
    for given in ({}, FLAGS, cached, {**LABELLED[KIND[name]], **FLAGS, **cached}):
        a, b = ours(ids, **given), theirs(ids, **given)
        assert type(a).__name__ == type(b).__name__
        assert list(a.keys()) == list(b.keys()), "the same fields, in the same order"
        assert isinstance(a, monoblock.ModelOutput)
        assert a[0] is a.to_tuple()[0]
        for key in a:
            assert a[key] is getattr(a, key)
        as_tuple = ours(ids, **given, return_dict=False)
        assert type(as_tuple) is tuple
        assert len(as_tuple) == len(a.keys())
        if KIND[name] not in ("token", "span"):  # there transformers' tuples lose the hidden states
            assert len(as_tuple) == len(theirs(ids, **given, return_dict=False))
        for x, y in zip(as_tuple, a.to_tuple(), strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y)
            elif isinstance(x, tuple):
                assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert a.cross_attentions is None if hasattr(b, "cross_attentions") else True


@pytest.mark.parametrize("name", CLASSES)
def test_flags_from_the_config(name: str) -> None:
    _, ours = pair(name)
    ids = torch.arange(10, 16)[None]
    keys = ours(ids, **FLAGS).keys()
    before = vars(ours.config).copy()
    try:
        ours.config.output_hidden_states = ours.config.output_attentions = True
        assert ours(ids).keys() == keys
        assert "attentions" not in ours(ids, output_attentions=False)
        ours.config.return_dict = False
        assert type(ours(ids)) is tuple
        assert not isinstance(ours(ids, return_dict=True), tuple)
        ours.config.return_dict = True
        if KIND[name] in (None, "causal", "sequence"):
            ours.config.use_cache = True
            assert "past_key_values" in ours(ids)
            assert "past_key_values" not in ours(ids, use_cache=False)
    finally:
        vars(ours.config).clear()
        vars(ours.config).update(before)


@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments(name: str) -> None:
    theirs, ours = pair(name)
    ids, mask = batch("left")
    args = (ids, mask) if KIND[name] == "span" else (ids, None, mask)
    where = None if KIND[name] == "sequence" else mask
    assert_close("by position", logits_of(ours(*args)), logits_of(theirs(*args)), ATOL, where)


@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_the_hubs(name: str) -> None:
    theirs, ours = pair(name)
    ids = torch.arange(10, 16)[None]
    wrong = [{}, {"input_ids": ids, "inputs_embeds": torch.zeros(1, 6, 36)}]
    for given in wrong:
        with pytest.raises(ValueError) as expected:
            theirs(**given)
        with pytest.raises(ValueError) as found:
            ours(**given)
        assert str(expected.value) in str(found.value)
    if KIND[name] == "sequence":
        config = monoblock.MptConfig(**fields(6, pad_token_id=None))
        with pytest.raises(ValueError, match="Cannot handle batch sizes > 1 if no padding token is defined"):
            monoblock.MptForSequenceClassification(config)(torch.arange(10, 16).reshape(2, 3))


def test_masks_of_any_number_type() -> None:
    _, ours = pair("MptModel")
    ids, mask = batch("left")
    expected = ours(ids, attention_mask=mask)[0]
    for dtype in (torch.bool, torch.float32, torch.int32, torch.bfloat16):
        assert torch.equal(ours(ids, attention_mask=mask.to(dtype))[0], expected)
    assert torch.equal(ours(ids.int(), attention_mask=mask)[0], expected), "int32 ids"


# ---------------------------------------------------------------------------- where the definition decides


@pytest.mark.parametrize("by", ["pad_id", "attention_mask"])
@torch.no_grad()
def test_the_last_token_of_a_row(by: str) -> None:
    """With pad == eos: a final eos, a row of nothing else, and both without a mask."""
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
def test_embeddings_are_classified_where_the_mask_ends() -> None:
    """transformers takes the last place, be it padding."""
    _, ours = pair("MptForSequenceClassification")
    ids, mask = batch("right")
    embeds = ours.get_input_embeddings()(ids)
    a, b = ours(inputs_embeds=embeds, attention_mask=mask), ours(ids, attention_mask=mask)
    assert_close("classified from embeddings", a.logits, b.logits, 1e-6)
    assert_close("last place", ours(inputs_embeds=embeds[:1]).logits, ours(ids[:1]).logits, 1e-6)


@torch.no_grad()
def test_longer_than_max_seq_len() -> None:
    """transformers' ALiBi table ends at max_seq_len; one with a longer table is what ours must equal."""
    _, ours = pair("MptForCausalLM", 3)
    ids = torch.randint(PAD + 1, VOCAB, (1, 200), generator=torch.Generator().manual_seed(5))
    longer = transformers.MptForCausalLM(transformers.MptConfig(**fields(3, max_seq_len=256))).eval()
    longer.load_state_dict(pair("MptForCausalLM", 3)[0].state_dict())
    assert ours.config.max_seq_len == 64
    assert_close("beyond max_seq_len", ours(ids).logits, longer(ids).logits, ATOL)
