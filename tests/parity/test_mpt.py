"""The five MPT classes against transformers', on tiny random models with a value of its own in every field that
transformers honours."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
import transformers
from helpers import CLASSES, KIND, PAD, PADDINGS, batch, chunks, one_by_one, parameters, randomised
from measure import assert_close

import monoblock
from monoblock import DynamicCache, StaticCache

ATOL = 1e-5  # fp32; states and logits are of the order of 1 to 10, measured 6e-6 at most
GRADIENT_ATOL = 1e-5  # gradients of a mean loss are below 1, measured 2e-6
VOCAB, LABELS, TOKENS = 89, 4, 23


def fields(heads: int, **more: Any) -> dict[str, Any]:
    # The clip bites: projections have a deviation of about 1.2.
    attn = {"clip_qkv": 0.9, "softmax_scale": 0.23}
    sizes = {"d_model": 6 * heads, "n_heads": heads, "n_layers": 3, "vocab_size": VOCAB, "max_seq_len": 64}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    return {**sizes, **ids, "layer_norm_epsilon": 1e-3, "num_labels": LABELS, "attn_config": attn, **more}


@functools.cache
def pair(name: str, heads: int = 6, tied: bool = True, labels: int = LABELS) -> tuple[Any, Any]:
    """The same random model in transformers and here."""
    kwargs = fields(heads, tie_word_embeddings=tied, num_labels=labels)
    theirs = randomised(getattr(transformers, name)(transformers.MptConfig(**kwargs)), seed=heads).eval()
    ours = getattr(monoblock, name)(monoblock.MptConfig(**kwargs)).eval()
    ours.load_state_dict(
        {k: v.clone() for k, v in theirs.state_dict().items() if k != "lm_head.weight" or not tied}
    )
    return theirs, ours


def logits_of(out: Any) -> torch.Tensor:
    """All that a head says, (batch, [tokens,] outputs)."""
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    return out.logits if "logits" in out else out.last_hidden_state


def labels_of(ids: torch.Tensor, mask: torch.Tensor | None, high: int) -> torch.Tensor:
    """Labels with -100 at padding, after it (what a padding predicts means nothing), and here and there."""
    labels = (ids * 7 + 1) % high
    labels[:, 5::6] = -100
    if mask is not None:
        labels[(mask == 0) | (mask.roll(1, 1) == 0)] = -100
    return labels


# ---------------------------------------------------------------------------- forward


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("heads", [3, 6, 8])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_states_attentions_and_logits(name: str, heads: int, padding: str) -> None:
    theirs, ours = pair(name, heads)
    ids, mask = batch(padding)
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    # Compared at padding too: all kernels make the same of it, and a span's loss takes it in.
    for kernel in ("sdpa", "eager"):
        ours.set_attn_implementation(kernel)
        out = ours(ids, attention_mask=mask, output_hidden_states=True)
        assert_close(f"{name} logits, {kernel}", logits_of(out), logits_of(expected), ATOL)
        assert len(out.hidden_states) == len(expected.hidden_states) == 4
        for i, (a, b) in enumerate(zip(out.hidden_states, expected.hidden_states, strict=True)):
            assert_close(f"hidden state {i}, {kernel}", a, b, ATOL)
    ours.set_attn_implementation(None)
    out = ours(ids, attention_mask=mask, output_attentions=True)
    assert_close(f"{name} logits with attentions", logits_of(out), logits_of(expected), ATOL)
    assert len(out.attentions) == len(expected.attentions) == 3
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        assert_close("attentions", a, b, ATOL)


@torch.no_grad()
def test_untied_head() -> None:
    theirs, ours = pair("MptForCausalLM", tied=False)
    ids, mask = batch("left")
    assert ours.head.out.weight is not ours.backbone.embed.weight
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


# ---------------------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["MptForCausalLM", "MptForTokenClassification"])
def test_token_losses_and_gradients(name: str, padding: str) -> None:
    theirs, ours = pair(name)
    ids, mask = batch(padding)
    labels = labels_of(ids, mask, VOCAB if name == "MptForCausalLM" else LABELS)
    check_gradients(name, theirs, ours, ids, mask, labels=labels)


def test_causal_loss_with_a_count() -> None:
    theirs, ours = pair("MptForCausalLM")
    ids, mask = batch("left")
    check_gradients(
        "counted", theirs, ours, ids, mask, labels=labels_of(ids, mask, VOCAB), num_items_in_batch=77
    )


SEQUENCE_LABELS = {
    "one class": (LABELS, None, torch.tensor([2, 0, 3])),
    "multi-hot": (LABELS, None, torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]])),
    "a number": (1, None, torch.tensor([0.3, -1.7, 2.5])),
    "several numbers": (
        LABELS,
        "regression",
        torch.randn(3, LABELS, generator=torch.Generator().manual_seed(0)),
    ),
    "said: one class": (LABELS, "single_label_classification", torch.tensor([1, 1, 2])),
    "said: multi-hot": (LABELS, "multi_label_classification", torch.ones(3, LABELS)),
}


@pytest.mark.parametrize("case", SEQUENCE_LABELS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_sequence_losses_and_gradients(case: str, padding: str) -> None:
    count, problem, labels = SEQUENCE_LABELS[case]
    theirs, ours = pair("MptForSequenceClassification", labels=count)
    ids, mask = batch(padding)
    theirs.config.problem_type, spec = problem, ours.head.spec
    ours.head.spec = monoblock.heads.HeadSpec(kind="sequence", labels=count, problem_type=problem, pad_id=PAD)
    try:
        check_gradients(f"sequence, {case}", theirs, ours, ids, mask, labels=labels)
    finally:
        theirs.config.problem_type, ours.head.spec = None, spec
    assert ours.config.problem_type is None, "the type is inferred for one call only"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "ends", [[7, 16, 12], [7, TOKENS, 999], [[7], [16], [12]]], ids=["in", "outside", "column"]
)
def test_span_losses_and_gradients(ends: list[Any], padding: str) -> None:
    theirs, ours = pair("MptForQuestionAnswering")
    ids, mask = batch(padding)
    check_gradients(
        "span",
        theirs,
        ours,
        ids,
        mask,
        start_positions=torch.tensor([4, 15, 8]),
        end_positions=torch.tensor(ends),
    )


def check_gradients(what: str, theirs: Any, ours: Any, ids: Any, mask: Any, **labels: Any) -> None:
    """The loss, and its gradients with respect to the inputs and to every parameter."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        embeds = module.get_input_embeddings().weight.detach()[ids].requires_grad_()
        # Through ids for the table's gradient, through embeddings for the inputs'; a row is classified at the
        # same place in both, as only one of them knows the pad id.
        loss = module(ids, attention_mask=mask, **labels).loss
        loss.backward()
        by_embeds = None
        if "sequence" not in what:
            other = module(inputs_embeds=embeds, attention_mask=mask, **labels).loss
            other.backward()
            by_embeds = embeds.grad
            assert_close(f"{what} loss from embeddings", other, loss, 1e-6)
        grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        results.append((loss, by_embeds, grads))
    (loss_t, embeds_t, grads_t), (loss_o, embeds_o, grads_o) = results
    assert_close(f"{what} loss", loss_o, loss_t, ATOL)
    if embeds_t is not None:
        assert_close(f"{what} gradient of inputs", embeds_o, embeds_t, GRADIENT_ATOL, mask)
        assert embeds_t.abs().max() > 1e-4, "a gradient that says nothing"
    keymap = ours.keymap()
    for canonical, path in ours.parameter_names().items():
        (hub,) = keymap.source(canonical).names
        assert_close(f"{what} gradients of parameters", grads_o[path], grads_t[hub], GRADIENT_ATOL)


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
LABELLED = {
    None: {},
    "causal": {"labels": torch.ones(2, 6, dtype=torch.long)},
    "sequence": {"labels": torch.tensor([1, 2])},
    "token": {"labels": torch.ones(2, 6, dtype=torch.long)},
    "span": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}


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


COUNTED = {
    "MptForTokenClassification": lambda ids: {"labels": labels_of(ids, None, LABELS)},
    "MptForQuestionAnswering": lambda _: {
        "start_positions": torch.tensor([1, 2, 3]),
        "end_positions": torch.tensor([9, 99, 4]),
    },
    "MptForSequenceClassification": lambda _: {"labels": torch.tensor([1, 2, 3])},
}


@pytest.mark.parametrize("count", [None, 5, torch.tensor(7)], ids=["mean", "5", "7"])
@pytest.mark.parametrize("name", COUNTED)
def test_every_loss_is_divided_by_the_count(name: str, count: Any) -> None:
    """transformers takes num_items_in_batch for the causal head only; accumulation needs it for all."""
    _, ours = pair(name)
    ids, _ = batch("none")
    given = COUNTED[name](ids)
    out = ours(ids, **given, num_items_in_batch=count)
    scores = logits_of(out).detach().double().numpy()
    number = None if count is None else int(count)
    if KIND[name] == "span":
        expected = oracle.span_loss(
            scores[..., 0], scores[..., 1], given["start_positions"], given["end_positions"], number
        )
    else:
        expected = oracle.cross_entropy(scores, given["labels"], number)
    assert_close("counted loss", out.loss, expected, ATOL)


@pytest.mark.parametrize(
    "problem", ["regression", "multi_label_classification", "single_label_classification"]
)
@pytest.mark.parametrize("count", [None, 10])
def test_sequence_losses_are_the_definition(problem: str, count: int | None) -> None:
    config = monoblock.MptConfig(**fields(6, problem_type=problem))
    ours = randomised(monoblock.MptForSequenceClassification(config)).eval()
    ids, mask = batch("right")
    labels = torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    labels = torch.tensor([3, 0, 1], dtype=torch.int32) if problem.startswith("single") else labels
    out = ours(ids, attention_mask=mask, labels=labels, num_items_in_batch=count)
    scores = out.logits.detach().double().numpy()
    assert_close(
        "sequence loss", out.loss, oracle.sequence_loss(scores, labels.numpy(), problem, count), 1e-6
    )


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name] in ("causal", "token", "span")])
def test_no_label_at_all_is_a_loss_of_zero(name: str) -> None:
    """transformers gives NaN, which ends a training run."""
    _, ours = pair(name)
    ids, _ = batch("none")
    nothing = torch.full_like(ids, -100)
    outside = torch.tensor([-1, TOKENS, 500])
    given = (
        {"start_positions": outside, "end_positions": outside}
        if KIND[name] == "span"
        else {"labels": nothing}
    )
    ours.zero_grad()
    loss = ours(ids, **given).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_negative_span_positions_are_outside() -> None:
    """The page: positions outside the text are not taken into account. transformers takes -1 for the first token."""
    _, ours = pair("MptForQuestionAnswering")
    ids, _ = batch("none")
    out = ours(ids, start_positions=torch.tensor([-1, 4, 2]), end_positions=torch.tensor([3, 5, -100]))
    two = oracle.span_loss(
        out.start_logits.detach().numpy(),
        out.end_logits.detach().numpy(),
        torch.tensor([-1, 4, 2]),
        torch.tensor([3, 5, -100]),
    )
    assert_close("span loss", out.loss, two, 1e-6)


def test_a_final_eos_that_is_also_the_padding_is_classified() -> None:
    """With pad == eos transformers classifies at the token before the final eos."""
    _, ours = pair("MptForSequenceClassification")
    ids, mask = batch("right")
    last = mask.sum(1) - 1
    ids[torch.arange(3), last] = PAD
    out = ours(ids, attention_mask=mask, output_hidden_states=True)
    hidden = out.hidden_states[-1].detach().double().numpy()
    picked = oracle.pooled(hidden, ids.numpy(), mask.numpy(), PAD)
    expected = oracle.logits(ours.spec, parameters(ours), picked, "sequence")
    assert_close("pooled logits", out.logits, expected, ATOL)


@torch.no_grad()
def test_embeddings_are_classified_where_the_mask_ends() -> None:
    """transformers takes the last place, be it padding."""
    _, ours = pair("MptForSequenceClassification")
    ids, mask = batch("right")
    embeds = ours.get_input_embeddings()(ids)
    a, b = ours(inputs_embeds=embeds, attention_mask=mask), ours(ids, attention_mask=mask)
    assert_close("classified from embeddings", a.logits, b.logits, 1e-6)
    assert_close("last place", ours(inputs_embeds=embeds[:1]).logits, ours(ids[:1]).logits, 1e-6)


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name]])
def test_int32_labels(name: str) -> None:
    """transformers' losses refuse some of them."""
    _, ours = pair(name)
    ids = torch.arange(10, 22).reshape(2, 6)
    narrow = {key: value.int() for key, value in LABELLED[KIND[name]].items()}
    assert torch.equal(ours(ids, **narrow).loss, ours(ids, **LABELLED[KIND[name]]).loss)


def test_the_problem_type_is_inferred_for_each_call() -> None:
    """transformers writes it into the config at the first call."""
    _, ours = pair("MptForSequenceClassification")
    ids = torch.arange(10, 22).reshape(2, 6)
    hot = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    first = ours(ids, labels=hot).loss
    ours(ids, labels=torch.tensor([1, 2]))
    assert torch.equal(ours(ids, labels=hot).loss, first)
    scores = ours(ids).logits.detach().double().numpy()
    assert_close("multi-hot", first, oracle.sequence_loss(scores, hot, "multi_label_classification"), 1e-6)


@torch.no_grad()
def test_longer_than_max_seq_len() -> None:
    """transformers' ALiBi table ends at max_seq_len; one with a longer table is what ours must equal."""
    _, ours = pair("MptForCausalLM", 3)
    ids = torch.randint(PAD + 1, VOCAB, (1, 200), generator=torch.Generator().manual_seed(5))
    longer = transformers.MptForCausalLM(transformers.MptConfig(**fields(3, max_seq_len=256))).eval()
    longer.load_state_dict(pair("MptForCausalLM", 3)[0].state_dict())
    assert ours.config.max_seq_len == 64
    assert_close("beyond max_seq_len", ours(ids).logits, longer(ids).logits, ATOL)
