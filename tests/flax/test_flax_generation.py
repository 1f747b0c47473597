"""Generation on JAX: PyTorch's tokens in every family, with every cache and loop; what is compiled, and when."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_families
import torch
from flax_models import config_of, flax_model, ids_of, torch_model
from tiny_families import GENERATING, VOCAB, model_inputs, with_images

import monoblock
from monoblock.backends.flax import passes

torch.set_num_threads(1)
MPT = "MptForCausalLM"
NAMES = (MPT, *GENERATING)
MISTRAL = "MistralForCausalLM"
NEW = 41  # tokens, to four windows and more beyond every window
ASKED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, "max_new_tokens": NEW}
# Small random models fall into one token's loop, where a wrong cache would go unseen.
VARIED: dict[str, Any] = {**ASKED, "no_repeat_ngram_size": 2}


def pair(name: str, **more: Any) -> tuple[Any, Any]:
    """The same random model on PyTorch and on JAX."""
    if not more:
        return torch_model(name), flax_model(name)
    theirs = helpers.randomised(getattr(monoblock, name)(config_of(name, **more))).eval()
    ours = getattr(monoblock, "Flax" + name)(config_of(name, **more))
    ours.params = ours.params_from_hub({k: x.detach().numpy() for k, x in theirs.hub_state_dict().items()})
    return theirs, ours


def windowed(name: str) -> tuple[Any, Any]:
    return pair(name, attn={"sliding_window_size": 5}) if name == MPT else pair(name)


def prompts(name: str) -> dict[str, torch.Tensor]:
    ids, mask = model_inputs(MISTRAL if name == MPT else name, "left")
    return {"input_ids": ids, "attention_mask": mask}


def numpy(given: dict[str, Any]) -> dict[str, Any]:
    def turned(value: Any) -> Any:
        if isinstance(value, list):
            return [turned(item) for item in value]
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return {name: turned(value) for name, value in given.items()}


def tokens(model: Any, given: dict[str, Any], **asked: Any) -> list[list[int]]:
    """The ids that either kind of model gives."""
    if isinstance(model, torch.nn.Module):
        asked.pop("disable_compile", None)
        return model.generate(**given, **asked).tolist()
    found = model.generate(**numpy(given), **asked)
    assert isinstance(found.sequences, jax.Array)
    return found.sequences.tolist()


@contextmanager
def compilations():
    """The names of what is compiled inside."""
    found: list[str] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()).startswith("Compiling"):
                found.append(message.split()[1])

    logger, reader = logging.getLogger("jax"), Reader()
    logger.addHandler(reader)
    propagates, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(reader)
        logger.propagate = propagates


# ---------------------------------------------------------------------------- PyTorch's tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_as_pytorch_padded_and_past_the_window(name: str) -> None:
    theirs, ours = windowed(name)
    given = prompts(name)
    expected = tokens(theirs, given, **VARIED)
    assert len({token for row in expected for token in row[23:]}) > 10, "tokens that say something"
    assert tokens(ours, given, **VARIED) == expected
    if name not in (MISTRAL, "GPTNeoForCausalLM"):
        return
    assert tokens(ours, given, **VARIED, disable_compile=True) == expected, "the host loop"
    alone = tokens(ours, {"input_ids": given["input_ids"][1:2, -9:]}, **VARIED)
    assert [row[9:] for row in alone] == [expected[1][23:]], "a row on its own"


def test_no_cache_and_no_window() -> None:
    theirs, ours = pair(MISTRAL, sliding_window=None)
    given, asked = prompts(MISTRAL), {**VARIED, "max_new_tokens": 12}
    expected = tokens(theirs, given, **asked)
    assert tokens(ours, given, **asked) == expected
    assert tokens(ours, given, **asked, use_cache=False) == expected


def test_a_window_in_some_layers() -> None:
    """Windowed layers drop what full ones keep, in the compiled loop and in the host's."""
    theirs, ours = pair(
        MISTRAL, num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"]
    )
    given = prompts(MISTRAL)
    expected = tokens(theirs, given, **VARIED)
    assert len({token for row in expected for token in row[23:]}) > 10, "tokens that say something"
    assert tokens(ours, given, **VARIED) == expected
    assert tokens(ours, given, **VARIED, disable_compile=True) == expected


BEAMS = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 14, "eos_token_id": [2, 17, 30]}


@pytest.mark.parametrize("name", [MPT, MISTRAL])
def test_the_same_beams_as_pytorch(name: str) -> None:
    theirs, ours = pair(name)
    given = prompts(name)
    expected = theirs.generate(
        **given, **{**ASKED, **BEAMS}, return_dict_in_generate=True, output_scores=True
    )
    found = ours.generate(**numpy(given), **{**ASKED, **BEAMS})
    assert found.sequences.tolist() == expected.sequences.tolist()
    np.testing.assert_allclose(found.scores, expected.sequences_scores, atol=1e-5)  # sums of 14 logs of fp32
    if name == MISTRAL:
        host = tokens(ours, given, **{**ASKED, **BEAMS}, disable_compile=True)
        assert host == expected.sequences.tolist()


BEAM_RULES = [
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"length_penalty": -1.0, "early_stopping": True, "repetition_penalty": 1.3},
    {"length_penalty": 0.0, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "num_beams": 3},
]


@pytest.mark.parametrize("rules", BEAM_RULES, ids=str)
def test_the_rules_of_beams(rules: dict[str, Any]) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**ASKED, **BEAMS, **rules}
    assert tokens(ours, prompts(MISTRAL), **asked) == tokens(theirs, prompts(MISTRAL), **asked)


def test_sampled_beams_draw_the_same_in_either_loop() -> None:
    model, given = flax_model(MISTRAL), prompts(MISTRAL)
    asked = {**ASKED, **BEAMS, "do_sample": True, "top_p": 0.9, "return_dict_in_generate": True}
    found = [model.generate(**numpy(given), **asked, seed=3, disable_compile=host) for host in (False, True)]
    for name in ("sequences", "beam_indices"):
        assert found[0][name].tolist() == found[1][name].tolist()
    assert found[0].beam_indices.shape == (9, found[0].sequences.shape[1] - 23)
    assert (
        tokens(model, given, **{**asked, "return_dict_in_generate": None}, seed=4)
        != found[0].sequences.tolist()
    )


PROCESSORS = [
    {"repetition_penalty": 1.4, "min_new_tokens": 5, "eos_token_id": [9, 2], "suppress_tokens": [40, 41]},
    {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "forced_eos_token_id": 2},
    {
        "bad_words_ids": [[5], [6, 7], [50, 51, 52]],
        "sequence_bias": [[[60], 2.0], [[60, 61], 9.0], [[61, 60], 9.0]],
    },
    {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 44, "begin_suppress_tokens": [60]},
    {
        "min_length": 30,
        "eos_token_id": list(range(10, 60)),
        "remove_invalid_values": True,
        "renormalize_logits": True,
    },
]


@pytest.mark.parametrize("fields", PROCESSORS, ids=lambda fields: next(iter(fields)))
def test_processors_inside_the_program(fields: dict[str, Any]) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**VARIED, "max_new_tokens": 14, **fields}
    given = prompts(MISTRAL)
    expected = tokens(theirs, given, **asked)
    assert expected != tokens(theirs, given, **{**VARIED, "max_new_tokens": 14}), "the fields must matter"
    assert tokens(ours, given, **asked) == expected


def test_a_forced_first_token() -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**ASKED, "max_new_tokens": 5, "forced_bos_token_id": 33, "begin_suppress_tokens": [60]}
    for ids in ([[10]], [[10, 11]]):
        given = {"input_ids": torch.tensor(ids)}
        assert tokens(ours, given, **asked) == tokens(theirs, given, **asked)


def test_images_types_positions_and_embeddings() -> None:
    asked = {**ASKED, "max_new_tokens": 8}
    theirs, ours = pair("FuyuForCausalLM")
    ids, mask, patches, places = with_images((6, 0, 9))
    images = {"image_patches": patches, "image_patches_indices": places}
    given = {"input_ids": ids, "attention_mask": mask}
    expected = tokens(theirs, given | images, **asked)
    assert expected != tokens(theirs, given, **asked), "the images must matter"
    assert tokens(ours, given | images, **asked) == expected
    assert tokens(ours, given | {"pixel_values": torch.cat(patches)}, **asked) == expected
    theirs, ours = pair("OpenAIGPTLMHeadModel")
    given = prompts("OpenAIGPTLMHeadModel")
    types = {"token_type_ids": given["input_ids"] * 3 % VOCAB}
    assert tokens(ours, given | types, **asked) == tokens(theirs, given | types, **asked)
    theirs, ours = pair("GPTNeoForCausalLM")
    given = {"input_ids": prompts("GPTNeoForCausalLM")["input_ids"]}
    moved = {"position_ids": (torch.arange(23) + 5).expand(3, -1)}
    for how in ({}, {"use_cache": False}):
        assert tokens(ours, given | moved, **asked, **how) == tokens(theirs, given | moved, **asked)
    embeds = {"inputs_embeds": theirs.get_input_embeddings()(given["input_ids"]).detach()}
    assert tokens(ours, embeds, **asked, use_cache=False) == tokens(theirs, embeds, **asked)


# ---------------------------------------------------------------------------- what is compiled

SAMPLED = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {**SAMPLED, "min_new_tokens": 2},
        {"num_beams": 3},
        {"disable_compile": True, "repetition_penalty": 1.1},
    ],
    ids=["greedy", "sampling", "beams", "host"],
)
def test_ten_prompts_of_ten_lengths_compile_once(asked: dict[str, Any]) -> None:
    model = flax_model(MISTRAL)
    model.generate(ids_of(1, 17), **{**ASKED, **asked, "max_new_tokens": 9})
    with compilations() as found:
        for length in range(18, 28):
            numbers = {
                "temperature": length / 20,
                "top_p": 0.5 + length / 100,
                "repetition_penalty": length / 9,
            }
            asked |= {name: value for name, value in numbers.items() if name in asked}
            out = model.generate(ids_of(1, length), **{**ASKED, **asked, "max_new_tokens": length - 15})
            assert out.sequences.shape == (1, 2 * length - 15)
    assert found == []


def test_a_model_of_the_same_shape_shares_what_is_compiled() -> None:
    model = flax_model(MISTRAL)
    asked = {**ASKED, "max_new_tokens": 9}
    first = model.generate(ids_of(1, 17), **asked).sequences
    other = getattr(monoblock, "Flax" + MISTRAL)(config_of(MISTRAL), seed=3)
    before = passes.run_loop._cache_size(), passes.prefill._cache_size()
    assert other.generate(ids_of(1, 17), **asked).sequences.tolist() != first.tolist()
    assert model.generate(ids_of(1, 17), params=other.params, **asked).sequences.tolist() != first.tolist()
    assert (passes.run_loop._cache_size(), passes.prefill._cache_size()) == before


# ---------------------------------------------------------------------------- ends and draws


def test_rows_end_on_their_own_and_the_loop_with_the_last() -> None:
    theirs, ours = pair(MISTRAL)
    given = prompts(MISTRAL)
    free = tokens(theirs, given, **VARIED)
    ends = [free[0][23 + 3], free[1][23 + 7], free[2][23 + 5]]
    asked = {**VARIED, "eos_token_id": ends, "return_dict_in_generate": True}
    expected = theirs.generate(**given, **asked)
    found = ours.generate(**numpy(given), **asked)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert 23 < found.sequences.shape[1] < 23 + NEW
    assert int(found.past_key_values.length) == found.sequences.shape[1] - 1, "no token came after the last"


def test_draws() -> None:
    model = flax_model(MISTRAL)
    given = numpy(prompts(MISTRAL))
    asked = {**ASKED, "max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 0}

    def drawn(**more: Any) -> list[list[int]]:
        return model.generate(**given, **{**asked, **more}).sequences.tolist()

    first = drawn(seed=7)
    assert first == drawn(seed=7) == drawn(prng_key=jax.random.PRNGKey(7))
    assert first == drawn(seed=7, disable_compile=True), "the host loop draws the same"
    assert first != drawn(seed=8)
    assert drawn() == drawn(prng_key=jax.random.PRNGKey(0)), "as transformers' Flax classes did"
    greedy = tokens(torch_model(MISTRAL), prompts(MISTRAL), **{**ASKED, "max_new_tokens": 12})
    assert drawn(top_k=1) == drawn(temperature=1e-4) == greedy
    copies = np.array(drawn(num_return_sequences=3))
    assert len({tuple(row) for row in copies}) == 9


def test_draws_have_the_models_probabilities() -> None:
    model = flax_model(MISTRAL)
    ids = ids_of(1, 6)
    logits = np.asarray(model(ids).logits[0, -1], np.float64) / 2
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    out = model.generate(
        ids, do_sample=True, temperature=2.0, top_k=0, max_new_tokens=1, num_return_sequences=2000, seed=1
    )
    share = np.bincount(np.asarray(out.sequences)[:, -1], minlength=VOCAB) / 2000
    # Four standard deviations of a share of 2000 draws.
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3).all()


def test_nothing_to_draw_is_told_by_either_loop() -> None:
    model = flax_model(MISTRAL)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.params)
    for how in ({}, {"disable_compile": True}):
        with pytest.raises(ValueError, match="no token can be drawn"):
            model.generate(ids_of(1, 6), do_sample=True, max_new_tokens=4, params=broken, **how)


@pytest.mark.parametrize("how", [{}, {"disable_compile": True}, {"use_cache": False}], ids=str)
def test_texts_end_with_the_table_of_positions(how: dict[str, Any]) -> None:
    """The bucket of a prompt does not count; a text may take the last position and have one token more."""
    theirs, ours = pair("GPTNeoForCausalLM")
    given = {"input_ids": tiny_families.model_inputs("GPTNeoForCausalLM", "none")[0][:1, :20]}
    asked = {**VARIED, "max_new_tokens": 64 - 20 + 1}
    assert tokens(ours, given, **asked, **how) == tokens(theirs, given, **asked)
    with pytest.raises(ValueError, match="46 new tokens do not fit: the model has 64 learned positions"):
        tokens(ours, given, **{**asked, "max_new_tokens": 64 - 20 + 2}, **how)
