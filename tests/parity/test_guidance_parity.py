"""Classifier-free guidance and transition scores against transformers."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import PAD, batch  # noqa: E402
from tiny_families import VOCAB, pair  # noqa: E402

NAMES = ("MistralForCausalLM", "GPTNeoForCausalLM", "OpenAIGPTLMHeadModel")


@pytest.fixture(scope="module")
def models():
    made = {name: pair(name) for name in NAMES}
    for theirs, _ in made.values():
        theirs.generation_config = transformers.GenerationConfig()
    return made


def both(models, name, ids, mask, **fields):
    # transformers' GPT-1 has no cache, and its guidance fails without use_cache=False.
    fields = {"use_cache": name != "OpenAIGPTLMHeadModel", **fields}
    fields = {"eos_token_id": [2, 17], "pad_token_id": PAD, "max_new_tokens": 9, **fields}
    results = []
    for model in models[name]:
        torch.manual_seed(4)
        with torch.no_grad():
            results.append(model.generate(ids, attention_mask=mask, **fields))
    return results


def prompts():
    ids, _ = batch("none", (8, 8), VOCAB, 3, low=10)
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 1.5},
        {"guidance_scale": 0.0},
        {"guidance_scale": -2.0, "repetition_penalty": 1.3},
        {"guidance_scale": 3.0, "do_sample": True, "top_k": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("negative", [False, True])
def test_guided_tokens(models, name, fields, negative):
    if negative:
        ids, mask = batch("left", (6, 6), VOCAB, 5, low=10)
        fields = {**fields, "negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
    theirs, ours = both(models, name, *prompts(), **fields)
    assert ours.tolist() == theirs.tolist()


def test_padded_negative_prompts(models):
    """transformers passes no position ids for negative prompts, so padding is correct there for RoPE models only."""
    ids, mask = batch("left", (9, 4), VOCAB, 5, low=10)
    fields = {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask, "guidance_scale": 1.7}
    theirs, ours = both(models, "MistralForCausalLM", *prompts(), **fields)
    assert ours.tolist() == theirs.tolist()


def test_logits_are_unguided_and_scores_guided(models):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(models, "MistralForCausalLM", *prompts(), guidance_scale=2.0, **wanted)
    for kind in ("scores", "logits"):
        for mine, expected in zip(getattr(ours, kind), getattr(theirs, kind), strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-5)


def test_guidance_follows_its_beam(models):
    """transformers does not reorder the unconditional cache with the beams; here a beam is as if guided alone."""
    _, model = models["MistralForCausalLM"]
    ids, _ = prompts()
    options = {"guidance_scale": 2.0, "max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": None}
    out = model.generate(
        ids, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **options
    )
    totals = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices).sum(-1)
    for row, total in zip(out.sequences, totals, strict=True):
        step, score = ids.shape[1], 0.0
        forced = lambda _, ids, row=row: [int(row[len(ids)])]  # noqa: E731
        alone = model.generate(
            row[None, :step],
            prefix_allowed_tokens_fn=forced,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        score = model.compute_transition_scores(alone.sequences, alone.scores).sum()
        torch.testing.assert_close(total, score, atol=1e-4, rtol=1e-5)


def test_guidance_with_speculative_decoding(models):
    _, model = models["MistralForCausalLM"]
    ids = prompts()[0][:1]
    options = {"guidance_scale": 2.0, "max_new_tokens": 20, "pad_token_id": PAD, "eos_token_id": None}
    plain = model.generate(ids, **options).tolist()
    assert model.generate(ids, prompt_lookup_num_tokens=4, **options).tolist() == plain
    assert model.generate(ids, assistant_model=model, **options).tolist() == plain


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": list(range(30))},
        {"num_beams": 3, "do_sample": True, "early_stopping": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores(models, fields, normalize):
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    theirs, ours = both(models, "MistralForCausalLM", *prompts(), **wanted, **fields)
    scores = [
        model.compute_transition_scores(
            out.sequences, out.scores, out.get("beam_indices"), normalize_logits=normalize
        )
        for model, out in zip(models["MistralForCausalLM"], (theirs, ours), strict=True)
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_prompt_ids": [[5], [6]]}, "no effect without guidance_scale"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": [[5]]}, r"shape \(2, tokens\).*got \(1, 1\)"),
        (
            {"guidance_scale": 2.0, "negative_prompt_attention_mask": [[1]]},
            "negative_prompt_attention_mask needs negative_prompt_ids",
        ),
        (
            {
                "guidance_scale": 2.0,
                "negative_prompt_ids": [[5], [6]],
                "negative_prompt_attention_mask": [[1]],
            },
            r"shape of negative_prompt_ids, \(2, 1\), got \(1, 1\)",
        ),
        ({"guidance_scale": "much"}, "guidance_scale='much'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_guidance_arguments_raise(models, fields, message):
    with pytest.raises(ValueError, match=message):
        models["MistralForCausalLM"][1].generate(prompts()[0], max_new_tokens=2, **fields)


def test_transition_scores_without_scores_raise(models):
    _, model = models["MistralForCausalLM"]
    with pytest.raises(ValueError, match="output_scores=True"):
        model.compute_transition_scores(torch.ones(1, 3), None)
    with pytest.raises(ValueError, match="beam_indices"):
        model.compute_transition_scores(torch.ones(1, 3), (torch.ones(2, 5),))
