"""Every class of every family against transformers', on tiny random models: hidden states, attentions, logits, losses,
gradients and outputs."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from helpers import PADDINGS, parameters
from helpers import expected as defined
from measure import EPS, assert_close, largest, rounding
from tiny_families import (
    GENERATING,
    KIND,
    LABELS,
    LEARNED,
    PADS,
    TOKENS,
    VOCAB,
    explicit_positions,
    fields,
    labels_of,
    logits_of,
    model_inputs,
    model_pair,
    monoblock_model,
    pair,
    per_token,
    theirs_inputs,
)
from tiny_families import (
    MODEL_TYPES as CLASSES,
)

import monoblock
from monoblock.backends.pytorch.layers import Conv1D

# fp32, 3 layers, states up to 12: measured 1.1e-5; from float64's, ours differ by 0.9e-5 and transformers' by 1.2e-5.
ATOL = 1.5e-5
FUSED = 2e-5  # through the fused kernels, which sum in a different order
GRADIENT = 1e-5  # gradients of a mean loss are below 1

CAUSAL = ("MptForCausalLM", *GENERATING)
HEADED = [name for name in CLASSES if KIND[name] not in (None, "pooler")]
SEQUENCE = [name for name in CLASSES if KIND[name] in ("sequence", "first")]


def flat(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as (rows, tokens); choices are rows."""
    return mask if mask is None or mask.dim() == 2 else mask.flatten(0, 1)


# ---------------------------------------------------------------------------- forward


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("heads", [3, 6, 8])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_states_attentions_and_logits(name: str, heads: int, padding: str) -> None:
    theirs, ours = pair(name, heads)
    ids, mask = model_inputs(name, padding)
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = theirs(**theirs_inputs(name, ids, mask), **options)
    # MPT's kernels agree with transformers at padding too, which a span's loss includes.
    mpt = CLASSES[name] == "mpt"
    at, rows = (mask if per_token(name) and not mpt else None), (None if mpt else flat(mask))
    bound = rounding(ours.spec, expected)
    for kernel in ("sdpa", "eager"):
        ours.set_attn_implementation(kernel)
        out = ours(ids, attention_mask=mask, output_hidden_states=True)
        assert_close(f"{name} logits, {kernel}", logits_of(out), logits_of(expected), bound, at)
        assert len(out.hidden_states) == len(expected.hidden_states) == 4
        for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
            # transformers' double heads return the last state alone by choices.
            assert_close(f"{name} states, {kernel}", a, b.reshape(a.shape), bound, rows)
    ours.set_attn_implementation(None)
    out = ours(ids, attention_mask=mask, **options)
    assert_close(f"{name} logits with attentions", logits_of(out), logits_of(expected), bound, at)
    assert len(out.attentions) == len(expected.attentions) == 3
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        assert_close(f"{name} attentions", a.transpose(1, 2), b.transpose(1, 2), bound, rows)
    for other in ("mc_logits", "pooler_output"):
        if other in expected:
            assert_close(f"{name} {other}", out[other], expected[other], bound)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_inputs_embeds(name: str) -> None:
    theirs, ours = pair(name)
    nested = KIND[name] in ("choice", "double")
    shape = (1, 2, TOKENS) if nested else (1, TOKENS)
    embeds = torch.randn(*shape, ours.spec.width, generator=torch.Generator().manual_seed(3))
    expected = theirs(inputs_embeds=embeds if KIND[name] != "double" else embeds[0])
    found = ours(inputs_embeds=embeds)
    assert_close(
        f"{name} from embeddings",
        logits_of(found).reshape(logits_of(expected).shape),
        logits_of(expected),
        ATOL,
    )


@pytest.mark.parametrize("name", [name for name in CLASSES if CLASSES[name] not in ("fuyu", "mpt")])
@torch.no_grad()
def test_position_ids(name: str) -> None:
    """Positions with unequal steps: equal steps would not change attention under RoPE."""
    theirs, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    positions = (torch.arange(TOKENS) * 2 + 3).expand(ids.shape).clone()
    positions[..., 5:] += 4
    expected = theirs(ids, position_ids=positions.flatten(0, -2) if KIND[name] == "double" else positions)
    assert_close(
        f"{name} position_ids", logits_of(ours(ids, position_ids=positions)), logits_of(expected), ATOL
    )
    assert (logits_of(ours(ids)) - logits_of(expected)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in CLASSES if CLASSES[name] in ("openai-gpt", "gpt_neo")])
@torch.no_grad()
def test_token_type_ids(name: str) -> None:
    theirs, ours = pair(name)
    ids, mask = model_inputs(name, "left")
    types = (ids * 3 + 1) % VOCAB
    expected = theirs(**theirs_inputs(name, ids, mask), token_type_ids=types)
    found = ours(ids, attention_mask=mask, token_type_ids=types)
    assert_close(
        f"{name} token types", logits_of(found), logits_of(expected), FUSED, mask if per_token(name) else None
    )


@pytest.mark.parametrize(
    "name", [n for n in CLASSES if "head_mask" in monoblock.families.family_of(n).model_class(n).forward]
)
@torch.no_grad()
def test_head_mask(name: str) -> None:
    """A factor on a head's weights equals one on its columns of the output projection. transformers 5 has removed the
    argument, which the documentation of 4.37 has."""
    _, ours = pair(name)
    heads, layers, width = 6, 3, ours.spec.attention.head_dim
    ids, mask = model_inputs(name, "left")
    factors = torch.rand(layers, heads, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    factors[1, 2], factors[0, 0] = 0, 1
    for given in (factors, factors[1]):
        found = ours(ids, attention_mask=mask, head_mask=given, output_attentions=True)
        plain = ours(ids, attention_mask=mask, output_attentions=True)
        changed = [(_out(ours, i), f) for i, f in enumerate(given.expand(3, 6))]
        before = [weight.clone() for weight, _ in changed]
        for weight, factor in changed:
            weight *= factor.repeat_interleave(width)
        expected = ours(ids, attention_mask=mask, output_attentions=True)
        for (weight, _), old in zip(changed, before, strict=True):
            weight.copy_(old)
        assert_close(f"{name} head_mask", logits_of(found), logits_of(expected), ATOL)
        fused = ours(ids, attention_mask=mask, head_mask=given)
        assert_close(f"{name} head_mask, fused", logits_of(fused), logits_of(expected), FUSED)
        assert_close(
            "masked weights",
            found.attentions[0],
            plain.attentions[0] * given.expand(3, 6)[0][:, None, None],
            ATOL,
        )
    with pytest.raises(ValueError, match=r"head_mask must be \(6,\) or \(3, 6\)"):
        ours(ids, head_mask=torch.ones(3))


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 7, -1])], ids=["1", "5", "indices"])
@pytest.mark.parametrize("name", ["MptForCausalLM", "MistralForCausalLM", "FuyuForCausalLM"])
@torch.no_grad()
def test_logits_to_keep(name: str, keep: Any) -> None:
    theirs, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    found, expected = ours(ids, logits_to_keep=keep), theirs(ids, logits_to_keep=keep)
    assert_close("logits_to_keep", found.logits, expected.logits, ATOL)


# ---------------------------------------------------------------------------- losses and gradients


def compared(what: str, name: str, models: Any, ids: Any, mask: Any, **labels: torch.Tensor) -> None:
    """The losses, and their gradients with respect to every parameter, the embedding included."""
    theirs, ours = models
    for module in models:
        module.zero_grad()
    expected = theirs(**theirs_inputs(name, ids, mask), **labels)
    found = ours(ids, attention_mask=mask, **labels)
    for loss in ("loss", "mc_loss"):
        assert (loss in found) == (loss in expected)
        if loss in expected:
            assert_close(f"{what} {loss}", found[loss], expected[loss], ATOL)
    (expected.loss + expected.get("mc_loss", 0)).backward()
    (found.loss + found.get("mc_loss", 0)).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    compared = 0
    for key, parameter in ours.named_parameters():
        if parameter.grad is None:  # of image patches, which are not given
            assert grads.pop(key) is None
            continue
        wanted = grads.pop(key)
        if CLASSES[name] in ("mistral", "fuyu") and "embed_tokens" in key:
            # transformers never trains the embedding of the pad id; here it is trained, as it may also be the eos.
            wanted[PADS[CLASSES[name]]] = parameter.grad[PADS[CLASSES[name]]]
        bound = GRADIENT * max(1.0, float(wanted.abs().max()))
        assert_close(f"{what} gradients", parameter.grad, wanted, bound)
        compared += wanted.abs().max() > 1e-6
    assert not grads
    assert compared > 10, "gradients above rounding"


def _out(module: Any, layer: int) -> torch.Tensor:
    """The output projection's weight as (outputs, inputs); a view."""
    out = module.at("out", layer)
    return out.weight.t() if isinstance(out, Conv1D) else out.weight


# A span's loss includes logits at padding. Where a row is fully masked, transformers' additive masks leave these to
# rounding: test_padded_span_losses compares them with the oracle.
PADDED = [n for n in HEADED if KIND[n] != "span" or CLASSES[n] in ("mpnet", "mpt")]


@pytest.mark.parametrize(
    ("name", "padding"), [(n, p) for n in HEADED for p in PADDINGS if p == "none" or n in PADDED]
)
def test_losses_and_gradients(name: str, padding: str) -> None:
    ids, mask = model_inputs(name, padding)
    compared(name, name, pair(name), ids, mask, **labels_of(name, ids, mask))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in HEADED if n not in PADDED])
def test_padded_span_losses(name: str, padding: str) -> None:
    """Fully masked queries, before the first token or with only padding in their window, weigh all keys equally."""
    _, ours = pair(name)
    ids, mask = model_inputs(name, padding)
    run = defined(ours, ids, mask)
    scores = oracle.logits(ours.spec, parameters(ours), run.hidden, "span")
    labels = labels_of(name, ids, mask)
    loss = oracle.span_loss(
        scores[..., 0], scores[..., 1], labels["start_positions"], labels["end_positions"]
    )
    for kernel in ("sdpa", "eager", None):
        ours.set_attn_implementation(kernel)
        out = ours(ids, attention_mask=mask, **labels)
        assert_close(f"{name} at padding, {kernel}", logits_of(out), scores, FUSED)
        assert_close(f"{name} padded loss", out.loss, loss, ATOL)


SEQUENCE_LABELS = {
    "multi-hot": (LABELS, None, torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]])),
    "regression, one label": (1, None, torch.tensor([0.3, -1.7, 2.5])),
    "regression, several labels": (LABELS, "regression", torch.linspace(-1, 2, 12).reshape(3, LABELS)),
    "given: one class": (LABELS, "single_label_classification", torch.tensor([1, 1, 2])),
    "given: multi-hot": (LABELS, "multi_label_classification", torch.ones(3, LABELS)),
}


@pytest.mark.parametrize("case", SEQUENCE_LABELS)
@pytest.mark.parametrize("name", SEQUENCE)
def test_sequence_losses_and_gradients(name: str, case: str) -> None:
    count, problem, labels = SEQUENCE_LABELS[case]
    theirs, ours = pair(name, labels=count)
    ids, mask = model_inputs(name, "left")
    theirs.config.problem_type = ours.config.problem_type = problem
    try:
        compared(f"{name}, {case}", name, (theirs, ours), ids, mask, labels=labels)
        assert ours.config.problem_type == problem, "the type is inferred for one call only"
    finally:
        theirs.config.problem_type = ours.config.problem_type = None


@pytest.mark.parametrize("name", SEQUENCE)
def test_problem_type_is_read_from_the_config_at_each_call(name: str) -> None:
    """In the forward pass, compiled ones too, and in `loss_function`, whatever it was at construction."""
    theirs, ours = pair(name, labels=LABELS)
    ids, mask = model_inputs(name, "left")
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]])
    torch._dynamo.reset()  # each class is a recompilation of the same code
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    losses = []
    try:
        for problem in ("regression", "multi_label_classification"):
            theirs.config.problem_type = ours.config.problem_type = problem
            expected = theirs(**theirs_inputs(name, ids, mask), labels=labels).loss
            out = ours(ids, attention_mask=mask, labels=labels)
            assert_close(f"{problem}, set later", out.loss, expected, ATOL)
            assert torch.equal(ours.loss_function(logits=out.logits, labels=labels), out.loss)
            assert_close(problem, compiled(ids, attention_mask=mask, labels=labels).loss, expected, ATOL)
            losses.append(float(expected.detach()))
        ours.config.problem_type = "ranking"
        with pytest.raises(ValueError, match=r"problem_type must be one of .* got 'ranking'"):
            ours(ids, attention_mask=mask, labels=labels)
    finally:
        theirs.config.problem_type = ours.config.problem_type = None
    assert abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_losses_with_num_items_in_batch(name: str) -> None:
    theirs, ours = pair(name)
    ids, mask = model_inputs(name, "left")
    labels = labels_of(name, ids, mask)
    expected = theirs(
        **theirs_inputs(name, ids, mask), **labels, num_items_in_batch=77, output_hidden_states=True
    )
    found = ours(ids, attention_mask=mask, **labels, num_items_in_batch=torch.tensor(77)).loss
    assert_close(f"{name} counted loss", found, expected.loss, rounding(ours.spec, expected))


@pytest.mark.parametrize("count", [None, 5, torch.tensor(7)], ids=["mean", "5", "7"])
@pytest.mark.parametrize("name", HEADED)
def test_every_loss_is_divided_by_num_items_in_batch(name: str, count: Any) -> None:
    """transformers honours num_items_in_batch for causal heads only; gradient accumulation needs it for all heads."""
    _, ours = pair(name)
    ids, mask = model_inputs(name, "right")
    labels = labels_of(name, ids, mask)
    out = ours(ids, attention_mask=mask, **labels, num_items_in_batch=count)
    scores, number = logits_of(out).detach().double().numpy(), None if count is None else int(count)
    options = {k: v.numpy() for k, v in labels.items()}
    if KIND[name] == "span":
        expected = oracle.span_loss(
            scores[..., 0], scores[..., 1], options["start_positions"], options["end_positions"], number
        )
    elif KIND[name] in ("causal", "double"):
        rows = scores.reshape(-1, *scores.shape[-2:])
        expected = oracle.causal_loss(rows, options["labels"].reshape(len(rows), -1), number)
    else:
        expected = oracle.cross_entropy(scores, options["labels"], number)
    # A sum over the tokens, each with the rounding of its logits, divided by a smaller number.
    bound = EPS * ids.numel() ** 0.5 * max(largest(scores), float(expected))
    assert_close(f"{name} counted loss", out.loss, expected, bound)
    if "mc_labels" in options:
        mc = oracle.cross_entropy(out.mc_logits.detach().double().numpy(), options["mc_labels"], number)
        assert_close("counted loss of choices", out.mc_loss, mc, ATOL)


@pytest.mark.parametrize("name", [n for n in HEADED if KIND[n] not in ("sequence", "first", "choice")])
def test_all_labels_ignored_is_a_loss_of_zero(name: str) -> None:
    """It is NaN in transformers, which ends a training run."""
    _, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    outside = {"start_positions": torch.tensor([-1, TOKENS, 500]), "end_positions": torch.full((3,), 99)}
    given = outside if KIND[name] == "span" else {"labels": torch.full_like(ids, -100)}
    ours.zero_grad()
    loss = ours(ids, **given).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("name", [n for n in SEQUENCE if KIND[n] == "sequence"])
@torch.no_grad()
def test_a_row_is_classified_at_its_last_token_before_padding(name: str) -> None:
    theirs, ours = pair(name)
    pad = PADS[CLASSES[name]]
    ids, mask = model_inputs(name, "right")
    ids[0, 4] = pad  # a pad id within the sequence
    expected = theirs(**theirs_inputs(name, ids, mask)).logits
    assert_close("classified by mask", ours(ids, attention_mask=mask).logits, expected, FUSED)
    assert_close("classified by pad id", ours(ids).logits, theirs(ids).logits, FUSED)
    # With pad == eos, the mask has no effect: published heads were trained at the token before a final eos.
    ids[torch.arange(3), mask.sum(1) - 1] = pad
    expected = theirs(**theirs_inputs(name, ids, mask)).logits
    assert_close("a final eos, by mask", ours(ids, attention_mask=mask).logits, expected, FUSED)
    assert_close("a final eos, by pad id", ours(ids).logits, theirs(ids).logits, FUSED)
    ours.config.last_token_by = "attention_mask"  # read at each call
    out = ours(ids, attention_mask=mask, output_hidden_states=True)
    ours.config.last_token_by = None
    hidden = out.hidden_states[-1].double().numpy()
    picked = oracle.pooled(hidden, ids.numpy(), mask.numpy(), pad, "attention_mask")
    assert_close(
        "the final eos", out.logits, oracle.logits(ours.spec, parameters(ours), picked, "sequence"), ATOL
    )
    assert (out.logits - expected).abs().max() > 0.1
    without = monoblock_model(name, **fields(CLASSES[name], pad_token_id=None))
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1 if no padding token is defined"):
        without(ids)
    assert without(ids[:1]).logits.shape == (1, LABELS)
    without.config.pad_token_id = pad  # the remedy of the error message
    without.load_state_dict(ours.state_dict())
    assert torch.equal(without(ids).logits, ours(ids).logits)


# ---------------------------------------------------------------------------- outputs

FLAGS = {"output_hidden_states": True, "output_attentions": True}
CACHED = [
    n
    for n in CLASSES
    if CLASSES[n] in ("mpt", "mistral", "gpt_neo", "fuyu") and KIND[n] in (None, "causal", "sequence")
]
# Two classes of GPT Neo return an output without the documented field, always None, in transformers.
CROSS = {"BaseModelOutputWithPastAndCrossAttentions", "CausalLMOutputWithCrossAttentions"}


@pytest.mark.parametrize("name", CLASSES)
def test_output_types_and_fields(name: str) -> None:
    theirs, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    cached = {"use_cache": True} if name in CACHED else {}
    for given in ({}, FLAGS, cached, {**(labels_of(name, ids, None) if name in HEADED else {}), **FLAGS}):
        found, expected = ours(ids, **given), theirs(ids, **given)
        if type(found).__name__ not in CROSS:
            assert type(found).__name__ == type(expected).__name__
        assert list(found.keys()) == list(expected.keys()), "the same fields, in the same order"
        assert isinstance(found, monoblock.ModelOutput)
        as_tuple = ours(ids, **given, return_dict=False)
        assert type(as_tuple) is tuple
        assert len(as_tuple) == len(found.keys())
        for x, y in zip(as_tuple, found.to_tuple(), strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y)
    documented = monoblock.families.family_of(name).model_class(name).output
    assert type(found).__name__ == documented


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_flags_from_the_config(name: str) -> None:
    _, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    keys = ours(ids, **FLAGS).keys()
    before = vars(ours.config).copy()
    try:
        ours.config.output_hidden_states = ours.config.output_attentions = True
        assert ours(ids).keys() == keys
        assert "attentions" not in ours(ids, output_attentions=False)
        ours.config.return_dict = False
        assert type(ours(ids)) is tuple
        assert not isinstance(ours(ids, return_dict=True), tuple)
        if name in CACHED:
            ours.config.return_dict = ours.config.use_cache = True
            assert "past_key_values" in ours(ids)
            assert "past_key_values" not in ours(ids, use_cache=False)
    finally:
        vars(ours.config).clear()
        vars(ours.config).update(before)


@pytest.mark.parametrize("name", [name for name in CACHED if CLASSES[name] != "mpt"])
@torch.no_grad()
def test_a_cache_is_returned_by_default_and_not_with_use_cache_false(name: str) -> None:
    """The default of these families' configs is use_cache=True, of MPT's False."""
    theirs, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    assert "past_key_values" in ours(ids)
    assert "past_key_values" in theirs(ids)
    assert "past_key_values" not in ours(ids, use_cache=False)


@pytest.mark.parametrize("name", CLASSES)
def test_errors(name: str) -> None:
    _, ours = pair(name)
    ids, _ = model_inputs(name, "none")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        ours()
    with pytest.raises(ValueError, match="both input_ids and inputs_embeds"):
        ours(input_ids=ids, inputs_embeds=torch.zeros(1, TOKENS, ours.spec.width))
    with pytest.raises(TypeError, match="has no argument 'token_types'"):
        ours(ids, token_types=ids)
    with pytest.raises(ValueError, match="input_ids hold the token 89"):
        ours(torch.full_like(ids, 89))
    if KIND[name] in ("masked", "pooler") or CLASSES[name] == "mpnet":
        for given in ({"use_cache": True}, {"past_key_values": monoblock.DynamicCache()}):
            with pytest.raises(ValueError, match="a bidirectional model has no cache"):
                ours(ids, **given)
        with pytest.raises(TypeError, match="has no argument 'token_type_ids'"):
            ours(ids, token_type_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_masks_of_any_number_type(name: str) -> None:
    _, ours = pair(name)
    ids, mask = model_inputs(name, "left")
    expected = logits_of(ours(ids, attention_mask=mask))
    for dtype in (torch.bool, torch.float32, torch.int32, torch.bfloat16):
        assert torch.equal(logits_of(ours(ids, attention_mask=mask.to(dtype))), expected)
    assert torch.equal(logits_of(ours(ids.int(), attention_mask=mask)), expected), "int32 ids"
    if mask.dim() == 3:
        flat_mask = mask.flatten(0, 1)
        found = logits_of(ours(ids, attention_mask=flat_mask))
        assert torch.equal(found, expected), "the form that transformers takes"


@pytest.mark.parametrize("name", [n for n in CLASSES if CLASSES[n] in LEARNED and KIND[n] == "causal"])
@torch.no_grad()
def test_positions_count_tokens_without_padding(name: str) -> None:
    """transformers counts padding too: there, a left-padded row differs from the row alone."""
    theirs, ours = pair(name)
    ids, mask = model_inputs(name, "left")
    for row, real in enumerate(mask == 1):
        alone = ours(ids[row, real][None]).logits[0]
        assert_close(f"{name} alone", ours(ids, attention_mask=mask).logits[row, real], alone, FUSED)
    off = (
        theirs(ids, attention_mask=mask).logits
        - theirs(ids, attention_mask=mask, **explicit_positions(CLASSES[name], mask)).logits
    )
    assert off[mask == 1].abs().max() > 0.05


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_tied_and_untied_heads(name: str, tied: bool) -> None:
    theirs, ours = model_pair(name, **fields(CLASSES[name], tie_word_embeddings=tied))
    ids, _ = model_inputs(name, "none")
    assert (ours.at("head_out").weight is ours.get_input_embeddings().weight) == tied
    assert_close(f"{name} tied {tied}", ours(ids).logits, theirs(ids).logits, FUSED)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_half_precision_is_close(name: str) -> None:
    """bf16 has 8 bits: errors of 3 layers stay below 5 % of values of about 10."""
    import copy

    theirs, ours = pair(name)
    ids, mask = model_inputs(name, "left")
    expected = logits_of(theirs(**theirs_inputs(name, ids, mask)))
    half = copy.deepcopy(ours).to(torch.bfloat16)
    at = mask if per_token(name) else None
    scale = 0.05 * float(expected.abs().max())
    assert_close("bf16 logits", logits_of(half(ids, attention_mask=mask)), expected, max(scale, 0.3), at)
