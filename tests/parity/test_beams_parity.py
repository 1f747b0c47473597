"""Beam search against transformers, token for token, in every causal family."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import PAD, batch, config, randomised  # noqa: E402
from tiny_families import GENERATING, VOCAB, pair  # noqa: E402

import monoblock  # noqa: E402

NAMES = ("MptForCausalLM", *GENERATING)
EOS = [2, 17, 40]


SIZES = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")


def mpt_pair():
    settings = config().to_dict()
    theirs = transformers.MptForCausalLM(transformers.MptConfig(**{k: settings[k] for k in SIZES})).eval()
    randomised(theirs)
    theirs.tie_weights()
    ours = monoblock.MptForCausalLM(config(max_seq_len=128)).eval()
    ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()})
    return theirs, ours


@pytest.fixture(scope="module")
def models():
    made = {name: mpt_pair() if name == "MptForCausalLM" else pair(name) for name in NAMES}
    for theirs, _ in made.values():
        theirs.generation_config = transformers.GenerationConfig()
    return made


def both(models, name, ids, mask, seed=None, **fields):
    """The same call in both libraries."""
    theirs, ours = models[name]
    fields = {"eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 10, **fields}
    results = []
    for model in (theirs, ours):
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            results.append(model.generate(ids, attention_mask=mask, **copy.deepcopy(fields)))
    return results


CALLS = [
    {"num_beams": 2},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 4},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.0},
    {"num_beams": 6, "eos_token_id": 5, "num_return_sequences": 6, "early_stopping": True},
    {"num_beams": 6, "eos_token_id": list(range(0, VOCAB, 2)), "min_new_tokens": 3},
    {"num_beams": 4, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "bad_words_ids": [[11], [12, 13], [20]], "min_length": 22},
    {"num_beams": 3, "forced_eos_token_id": 7, "max_new_tokens": 5},
    {"num_beams": 3, "renormalize_logits": True, "suppress_tokens": [4, 5], "num_return_sequences": 3},
]


def prompts(padding, seed=1):
    ids, mask = batch(padding, (14, 6, 9), VOCAB, seed, low=10)
    return ids, torch.ones_like(ids) if mask is None else mask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", CALLS, ids=str)
def test_tokens(models, name, fields):
    for padding, seed in (("none", 1), ("left", 2)):
        theirs, ours = both(models, name, *prompts(padding, seed), **fields)
        assert ours.tolist() == theirs.tolist(), padding


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_one_to_six_beams(models, name, seed):
    ids, mask = prompts("left", seed + 10)
    for beams in range(1, 7):
        theirs, ours = both(models, name, ids, mask, num_beams=beams, max_new_tokens=6)
        assert ours.tolist() == theirs.tolist(), beams


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3, "top_k": 0},
        {"num_beams": 4, "top_k": 20, "temperature": 1.5, "num_return_sequences": 2},
        {"num_beams": 2, "top_p": 0.5, "typical_p": 0.9, "early_stopping": True},
        {"num_beams": 3, "min_p": 0.3, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    ],
    ids=str,
)
def test_beam_sampling(models, fields):
    for name in ("MptForCausalLM", "MistralForCausalLM"):
        theirs, ours = both(models, name, *prompts("left"), seed=3, do_sample=True, **fields)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
        {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4, "eos_token_id": list(range(30))},
    ],
)
def test_scores_logits_attentions_and_hidden_states(models, fields):
    wanted = ("scores", "logits", "attentions", "hidden_states")
    flags = {"return_dict_in_generate": True, **{f"output_{name}": True for name in wanted}}
    for name in ("MptForCausalLM", "FuyuForCausalLM"):
        theirs, ours = both(models, name, *prompts("none"), **flags, **fields)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
        # Scores are sums of ten float32 logarithms.
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-5, rtol=1e-5)
        for kind in ("scores", "logits"):
            for mine, expected in zip(getattr(ours, kind), getattr(theirs, kind), strict=True):
                torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-5)
        for kind in ("attentions", "hidden_states"):
            for mine, expected in zip(getattr(ours, kind), getattr(theirs, kind), strict=True):
                for layer, their_layer in zip(mine, expected, strict=True):
                    torch.testing.assert_close(layer, their_layer, atol=1e-4, rtol=1e-4)


def test_scores_are_returned_only_with_output_scores(models):
    theirs, ours = both(models, "MptForCausalLM", *prompts("none"), num_beams=2, return_dict_in_generate=True)
    assert ours.scores is theirs.scores is None
    assert ours.sequences_scores is theirs.sequences_scores is None
    assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()


def test_prefix_function_is_called_for_each_beam(models):
    def allowed(prompt, ids):
        return [int(ids[-1] + 1 + prompt) % VOCAB, int(ids[-1] + 7) % VOCAB, 60, 61, 62]

    theirs, ours = both(
        models,
        "MptForCausalLM",
        *prompts("none"),
        num_beams=3,
        prefix_allowed_tokens_fn=allowed,
        num_return_sequences=3,
    )
    assert ours.tolist() == theirs.tolist()
