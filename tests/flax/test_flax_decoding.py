"""What `generate` takes and gives on JAX beside tokens: streams, recorded values, given caches, guesses, errors."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax_models import flax_model, ids_of, torch_model
from measure import assert_close
from tiny_families import model_inputs, with_images

import monoblock
from monoblock import GenerationConfig
from monoblock.backends.flax import passes
from monoblock.errors import UnsupportedConfig
from monoblock.generation.outputs import GenerateDecoderOnlyOutput
from monoblock.generation.resolve import UNSUPPORTED, UNSUPPORTED_ARGUMENTS

torch.set_num_threads(1)
NAME = "MistralForCausalLM"
ATOL = 2e-5  # fp32, 2 layers; scores reach 10
ASKED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, "max_new_tokens": 8}
VARIED = {**ASKED, "no_repeat_ngram_size": 2}


@pytest.fixture
def model() -> Any:
    return flax_model(NAME)


def expected(ids: Any, **asked: Any) -> list[list[int]]:
    return torch_model(NAME).generate(torch.as_tensor(np.asarray(ids)), **{**VARIED, **asked}).tolist()


def test_the_old_call_and_its_result(model: Any) -> None:
    ids = ids_of(2, 7)
    old = model.generate(
        jnp.asarray(ids), max_length=15, pad_token_id=3, prng_key=jax.random.PRNGKey(0), trace=True
    )
    assert isinstance(old.sequences, jax.Array)
    assert old.sequences.dtype == jnp.int32
    assert old.scores is None
    assert [*old] == ["sequences"]
    config = GenerationConfig(max_new_tokens=8, pad_token_id=3, do_sample=False)
    ways = {
        "config": model.generate(ids, config).sequences,
        "a tokenizer's output": model.generate(
            {"input_ids": ids, "attention_mask": np.ones_like(ids)}, config
        ).sequences,
        "lists": model.generate(input_ids=ids.tolist(), generation_config=config).sequences,
        "no trace": model.generate(ids, config, trace=False).sequences,
        "ids alone": model.generate(ids, config, return_dict_in_generate=False),
    }
    for how, found in ways.items():
        assert found.tolist() == old.sequences.tolist(), how
    assert isinstance(ways["ids alone"], jax.Array)


def test_parameters_of_the_callers(model: Any) -> None:
    bare = getattr(monoblock, "Flax" + NAME)(model.config, _do_init=False)
    found = bare.generate(ids_of(1, 7), params=model.params, **VARIED)
    assert found.sequences.tolist() == expected(ids_of(1, 7))


def test_streams(model: Any) -> None:
    got: list[Any] = []

    class Streamer:
        def put(self, value: Any) -> None:
            got.append(np.asarray(value).reshape(-1).tolist())

        def end(self) -> None:
            got.append("end")

    ids = ids_of(1, 7)
    found = model.generate(ids, streamer=Streamer(), **VARIED).sequences.tolist()
    assert found == expected(ids)
    assert got == [found[0][:7], *([token] for token in found[0][7:]), "end"]


def test_processors_and_criteria_of_the_callers_get_jax_arrays(model: Any) -> None:
    ids = ids_of(1, 7)

    def ban(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
        return scores.at[:, input_ids[0, -1]].set(-jnp.inf)

    def enough(input_ids: jax.Array, scores: Any) -> jax.Array:
        assert scores is None
        return jnp.full(input_ids.shape[0], input_ids.shape[1] >= 11)

    found = model.generate(ids, logits_processor=[ban], stopping_criteria=[enough], **ASKED).sequences
    assert found.shape == (1, 11)
    assert (np.diff(np.asarray(found)[0, 6:]) != 0).all()


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_recorded(model: Any, cached: bool) -> None:
    """Places of the bucket's padding are nobody's."""
    ids, mask = model_inputs(NAME, "left")
    asked = {
        **VARIED,
        "max_new_tokens": 3,
        "use_cache": cached,
        "return_dict_in_generate": True,
        **dict.fromkeys(
            ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), True
        ),
    }
    theirs = torch_model(NAME).generate(ids, attention_mask=mask, **asked)
    found = model.generate(ids.numpy(), attention_mask=mask.numpy(), **asked)
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert found.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        for ours, other in zip(getattr(found, name), getattr(theirs, name), strict=True):
            np.testing.assert_allclose(ours, other, atol=ATOL, err_msg=name)
    for step, (ours, other) in enumerate(zip(found.hidden_states, theirs.hidden_states, strict=True)):
        real = torch.nn.functional.pad(mask, (0, step), value=1)[:, -other[0].shape[1] :]
        for a, b in zip(ours, other, strict=True):
            assert_close("hidden states", torch.tensor(np.asarray(a)), b, ATOL, real)
    for step, layers in enumerate(found.attentions):
        for weights in layers:
            assert weights.shape == (3, 6, 1 if step and cached else 23 + step, 23 + step)
            np.testing.assert_allclose(weights[..., -1, :].sum(-1), 1, atol=1e-5)
    if not cached:
        last = torch.tensor(np.asarray(found.attentions[-1][1]))[:, :, -1]
        assert_close("weights", last, theirs.attentions[-1][1][:, :, -1], ATOL)
    values = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    other = torch_model(NAME).compute_transition_scores(
        theirs.sequences, theirs.scores, normalize_logits=True
    )
    np.testing.assert_allclose(values, other, atol=ATOL)


def test_a_given_cache_is_the_beginning_of_the_prompt(model: Any) -> None:
    """Its windows have rolled, and its places are too few: it grows, and stays as it was."""
    ids = ids_of(1, 31)
    first = model.generate(ids[:, :20], return_dict_in_generate=True, **VARIED)
    cache = first.past_key_values
    assert int(cache.length) == 27
    text = np.concatenate((np.asarray(first.sequences)[:, :28], ids[:, 27:]), axis=1)
    for _ in range(2):
        found = model.generate(text, past_key_values=cache, **{**VARIED, "max_new_tokens": 24})
        assert found.sequences.tolist() == expected(text, max_new_tokens=24)
    with pytest.raises(ValueError, match="past_key_values hold 27 tokens and the prompt has 20"):
        model.generate(ids[:, :20], past_key_values=cache, **VARIED)


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 5},
        {"prompt_lookup_num_tokens": 5, "use_cache": False},
        {"assistant_model": True},
    ],
    ids=str,
)
def test_guesses_change_nothing(model: Any, how: dict[str, Any]) -> None:
    """Past the window, whose tokens are taken back."""
    ids = ids_of(1, 20)
    if "assistant_model" in how:
        how = {"assistant_model": model, "num_assistant_tokens": 3}
    found = model.generate(ids, **{**ASKED, "max_new_tokens": 20}, **how).sequences
    assert found.tolist() == expected(ids, max_new_tokens=20, no_repeat_ngram_size=None)


def test_guesses_end_with_the_table_of_positions() -> None:
    """The padding of several tokens at once takes no position."""
    ours, theirs = flax_model("GPTNeoForCausalLM"), torch_model("GPTNeoForCausalLM")
    ids = ids_of(1, 40)
    asked = {**ASKED, "max_new_tokens": 25}
    found = ours.generate(ids, prompt_lookup_num_tokens=5, **asked).sequences
    assert found.tolist() == theirs.generate(torch.tensor(ids), **asked).tolist()


def test_guidance(model: Any) -> None:
    ids, other = ids_of(1, 9), ids_of(1, 5, seed=4)
    more = {"guidance_scale": 1.7}
    theirs = expected(ids, negative_prompt_ids=torch.tensor(other), **more)
    assert theirs != expected(ids)
    assert model.generate(ids, negative_prompt_ids=other, **VARIED, **more).sequences.tolist() == theirs


# ---------------------------------------------------------------------------- options


def test_a_prompt_in_chunks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the window and padded; the rest of a prompt goes in powers of two, so that few lengths are compiled."""
    sizes: list[int] = []
    extend = passes.extend

    def counted(network: Any, params: Any, given: Any, cache: Any, options: Any) -> Any:
        sizes.append(given["input_ids"].shape[1])
        return extend(network, params, given, cache, options)

    monkeypatch.setattr(passes, "extend", counted)
    monkeypatch.setattr(passes, "prefill", None)
    ids, mask = (x.numpy() for x in model_inputs(NAME, "left"))
    whole = torch_model(NAME).generate(torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), **VARIED)
    found = model.generate(ids, attention_mask=mask, prefill_chunk_size=6, **VARIED)
    assert found.sequences.tolist() == whole.tolist()
    assert sizes == [6, 6, 6, 4, 1]
    assert model.generate(ids_of(1, 23), prefill_chunk_size=6, **VARIED).sequences.tolist() == expected(
        ids_of(1, 23)
    )
    compiled = extend._cache_size(), passes.run_loop._cache_size()
    model.generate(ids_of(1, 29), prefill_chunk_size=6, **VARIED)
    assert (extend._cache_size(), passes.run_loop._cache_size()) == compiled
    monkeypatch.undo()
    # A cache that was given, and chunks after it.
    cache = model.generate(ids_of(1, 9), return_dict_in_generate=True, **VARIED).past_key_values
    text = np.concatenate((np.asarray(expected(ids_of(1, 9)))[:, :16], ids_of(1, 15)), axis=1)
    found = model.generate(text, past_key_values=cache, prefill_chunk_size=4, **VARIED)
    assert found.sequences.tolist() == expected(text)


def test_chunks_of_images() -> None:
    """A chunk may begin among an image's patches."""
    ids, mask, sets, indices = with_images((5, 3))
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "image_patches": sets,
        "image_patches_indices": indices,
    }
    whole = torch_model("FuyuForCausalLM").generate(**given, **VARIED).tolist()
    arrays = {
        n: [x.numpy() for x in value] if isinstance(value, list) else value.numpy()
        for n, value in given.items()
    }
    found = flax_model("FuyuForCausalLM").generate(**arrays, prefill_chunk_size=3, **VARIED)
    assert found.sequences.tolist() == whole


REASONS = {
    "cache_implementation": "the caches of the JAX classes are 'dynamic' and 'static'",
    "compile_config": "jax.jit compiles the loop over tokens, or with trace=False each step",
    "synced_gpus": "processes that share parameters make the same calls",
}


def test_every_refused_option_is_named(model: Any) -> None:
    for name, (_, reason) in (UNSUPPORTED | UNSUPPORTED_ARGUMENTS).items():
        with pytest.raises(
            UnsupportedConfig, match=f"{name}='else': .*{re.escape(REASONS.get(name, reason))}"
        ):
            model.generate(ids_of(1, 7), **{**ASKED, name: "else"})
    for kind in ("dynamic", "static"):
        found = model.generate(ids_of(1, 7), cache_implementation=kind, **VARIED).sequences
        assert found.tolist() == expected(ids_of(1, 7))


def test_what_is_wrong_is_told(model: Any) -> None:
    ids = ids_of(1, 7)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        (
            {"cache_implementation": "static", "max_cache_len": 9},
            "the static cache has room for 9 tokens and up to 14 are needed",
        ),
        (
            {"prng_key": jax.random.PRNGKey(0), "seed": 1},
            "generate() got prng_key and seed: give one of them",
        ),
        ({"token_type_ids": ids}, "token_type_ids"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0: expected an integer of at least 1"),
        ({"prefill_chunk_size": 2, "use_cache": False}, "cannot be combined with use_cache=False"),
        (
            {"prefill_chunk_size": 2, "return_dict_in_generate": True, "output_hidden_states": True},
            "cannot be combined with output_hidden_states=True",
        ),
        (
            {"bad_words_ids": [[5], [9999]]},
            "holds the token 9999, but the model's vocabulary has the ids 0 to",
        ),
    ]
    for more, sentence in wrong:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            model.generate(ids, **{**ASKED, **more})
    with pytest.raises(ValueError, match="input_ids hold the token 1000, but the model's vocabulary has"):
        model.generate([[1000]], **ASKED)
    with pytest.raises(
        TypeError, match=r"FlaxMistralModel has no language-model head: generate with a \.\.\.ForCausalLM"
    ):
        flax_model("MistralModel").generate(ids)
    with pytest.raises(TypeError, match="no language-model head"):
        flax_model("MPNetForMaskedLM").generate(ids)
    with pytest.raises(TypeError, match="assistant_model must be one of monoblock's"):
        model.generate(ids, assistant_model=torch_model(NAME), **ASKED)
