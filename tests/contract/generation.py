"""The contract of `generate`: PyTorch's tokens for every family, cache and loop, compiled programs that are reused, and
the distribution of sampled tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contract.models import (
    Contract,
    Pair,
    converted,
    fields,
    ids_of,
    image_inputs,
    inputs,
    numpy,
    reference,
    tokens,
)
from tiny_families import GENERATING, VOCAB

MPT, MISTRAL, GPT_NEO = "MptForCausalLM", "MistralForCausalLM", "GPTNeoForCausalLM"
NEW = 41  # tokens: several windows beyond the prompt
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, "max_new_tokens": NEW}
# Small random models soon repeat one token, which would hide a wrong cache.
VARIED: dict[str, Any] = {**OPTIONS, "no_repeat_ngram_size": 2}
EAGER: dict[str, Any] = {"disable_compile": True}
BEAMS = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 14, "eos_token_id": [2, 17, 30]}
BEAM_RULES = [
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"length_penalty": -1.0, "early_stopping": True, "repetition_penalty": 1.3},
    {"length_penalty": 0.0, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "num_beams": 3},
]
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
SAMPLED = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2}


def prompts(name: str = MISTRAL) -> dict[str, torch.Tensor]:
    """Three left-padded prompts of up to 23 tokens."""
    return inputs(name, "left")


class GenerationContract(Contract):
    # Class -> options of `generate` that compile its loop in another way than the default.
    modes: ClassVar[dict[str, dict[str, Any]]] = {}

    def no_new_programs(self, model: Any) -> AbstractContextManager[None]:
        """A context in which generation must compile or trace nothing."""
        raise NotImplementedError

    # ------------------------------------------------------------------------ PyTorch's tokens

    @pytest.mark.parametrize("name", [MPT, *GENERATING])
    def test_tokens_equal_pytorchs_with_padding_and_past_the_window(self, name: str, pair: Pair) -> None:
        attention = {**fields(MPT)["attn_config"], "sliding_window_size": 5}
        window = {"attn_config": attention} if name == MPT else {}
        theirs, ours = pair(name, **window)
        given = prompts(name)
        expected = tokens(theirs, given, **VARIED)
        assert len({token for row in expected for token in row[23:]}) > 10, "varied tokens"
        assert tokens(ours, given, **VARIED, **self.modes.get(name, {})) == expected
        if name in (MISTRAL, GPT_NEO):
            assert tokens(ours, given, **VARIED, **EAGER) == expected, "eager"
        alone = tokens(ours, {"input_ids": given["input_ids"][1:2, -9:]}, **VARIED, **EAGER)
        assert [row[9:] for row in alone] == [expected[1][23:]], "a batch of one"

    @pytest.mark.parametrize("window", [9, None])
    def test_tokens_are_the_same_without_a_cache(self, window: int | None, pair: Pair) -> None:
        theirs, ours = pair(MISTRAL) if window else pair(MISTRAL, sliding_window=None)
        options = {**VARIED, "max_new_tokens": 12}
        expected = tokens(theirs, prompts(), **options)
        assert tokens(ours, prompts(), **options, **self.graph) == expected
        assert tokens(ours, prompts(), **options, **self.graph, use_cache=False) == expected

    def test_sliding_window_in_some_layers(self, pair: Pair) -> None:
        """The windowed layers drop keys that the full ones keep."""
        layers = ["full_attention", "sliding_attention", "full_attention"]
        theirs, ours = pair(MISTRAL, num_hidden_layers=3, layer_types=layers)
        expected = tokens(theirs, prompts(), **VARIED)
        assert len({token for row in expected for token in row[23:]}) > 10, "varied tokens"
        for mode in (self.graph, EAGER):
            assert tokens(ours, prompts(), **VARIED, **mode) == expected

    @pytest.mark.parametrize("name", [MPT, MISTRAL])
    def test_beam_search_equals_pytorchs(self, name: str, pair: Pair) -> None:
        theirs, ours = pair(name)
        options = {**OPTIONS, **BEAMS, "return_dict_in_generate": True, "output_scores": True}
        expected = theirs.generate(**prompts(name), **options)
        found = ours.generate(**numpy(prompts(name)), **options, **EAGER)
        for key in ("sequences", "beam_indices"):
            assert np.asarray(found[key]).tolist() == expected[key].tolist(), key
        # Sums of 14 log-probabilities in float32.
        np.testing.assert_allclose(found.sequences_scores, expected.sequences_scores, atol=1e-5)
        if name == MISTRAL:
            assert tokens(ours, prompts(), **{**OPTIONS, **BEAMS}) == expected.sequences.tolist(), "compiled"

    @pytest.mark.parametrize("rules", BEAM_RULES, ids=str)
    def test_rules_of_beam_search(self, rules: dict[str, Any], pair: Pair) -> None:
        theirs, ours = pair(MISTRAL)
        options = {**OPTIONS, **BEAMS, **rules}
        assert tokens(ours, prompts(), **options, **self.graph) == tokens(theirs, prompts(), **options)

    @pytest.mark.parametrize("options", PROCESSORS, ids=lambda options: next(iter(options)))
    def test_logits_processors(self, options: dict[str, Any], pair: Pair) -> None:
        theirs, ours = pair(MISTRAL)
        plain = {**VARIED, "max_new_tokens": 14}
        expected = tokens(theirs, prompts(), **{**plain, **options})
        assert expected != tokens(theirs, prompts(), **plain), "the options must have an effect"
        assert tokens(ours, prompts(), **{**plain, **options}, **self.graph) == expected

    def test_forced_first_token(self, pair: Pair) -> None:
        theirs, ours = pair(MISTRAL)
        options = {**OPTIONS, "max_new_tokens": 5, "forced_bos_token_id": 33, "begin_suppress_tokens": [60]}
        for ids in ([[10]], [[10, 11]]):
            given = {"input_ids": torch.tensor(ids)}
            assert tokens(ours, given, **options, **self.graph) == tokens(theirs, given, **options)

    def test_images(self, pair: Pair) -> None:
        theirs, ours = pair("FuyuForCausalLM")
        options = {**OPTIONS, "max_new_tokens": 8}
        given = image_inputs((6, 0, 9))
        text = {key: given[key] for key in ("input_ids", "attention_mask")}
        expected = tokens(theirs, given, **options)
        assert expected != tokens(theirs, text, **options), "the images must have an effect"
        for mode in (self.graph, EAGER):
            assert tokens(ours, given, **options, **mode) == expected
        pixels = {"pixel_values": torch.cat(given["image_patches"])}
        assert tokens(ours, text | pixels, **options, **self.graph) == expected

    def test_token_types_positions_and_embeddings(self, pair: Pair) -> None:
        options = {**OPTIONS, "max_new_tokens": 8}
        theirs, ours = pair("OpenAIGPTLMHeadModel")
        given = prompts("OpenAIGPTLMHeadModel")
        given["token_type_ids"] = given["input_ids"] * 3 % VOCAB
        assert tokens(ours, given, **options, **self.graph) == tokens(theirs, given, **options)
        theirs, ours = pair(GPT_NEO)
        given = {"input_ids": prompts(GPT_NEO)["input_ids"]}
        shifted = given | {"position_ids": (torch.arange(23) + 5).expand(3, -1)}
        for cache in ({}, {"use_cache": False}):
            expected = tokens(theirs, shifted, **options, **cache)
            assert tokens(ours, shifted, **options, **cache, **EAGER) == expected
        embeds = {"inputs_embeds": theirs.get_input_embeddings()(given["input_ids"]).detach()}
        for cache in ({}, {"use_cache": False}):
            assert tokens(ours, embeds, **options, **cache, **EAGER) == tokens(theirs, embeds, **options)

    # ------------------------------------------------------------------------ compilation

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {**SAMPLED, "min_new_tokens": 2},
            {"num_beams": 3},
            {"repetition_penalty": 1.1, "logits_processor": [lambda ids, scores: scores]},
        ],
        ids=["greedy", "sampling", "beams", "host"],
    )
    def test_ten_prompt_lengths_share_a_program(self, options: dict[str, Any], pair: Pair) -> None:
        _, model = pair(MISTRAL)
        model.generate(ids_of(1, 17), **{**OPTIONS, **options, "max_new_tokens": 9}, **self.graph)
        with self.no_new_programs(model):
            for length in range(18, 28):
                values = {
                    "temperature": length / 20,
                    "top_p": 0.5 + length / 100,
                    "repetition_penalty": length / 9,
                }
                changed = {name: value for name, value in values.items() if name in options}
                new = {**OPTIONS, **options, **changed, "max_new_tokens": length - 15}
                out = model.generate(ids_of(1, length), **new, **self.graph)
                assert np.asarray(getattr(out, "sequences", out)).shape == (1, 2 * length - 15)

    # ------------------------------------------------------------------------ stopping and sampling

    def test_rows_stop_at_their_eos_and_the_loop_after_the_last(self, pair: Pair) -> None:
        theirs, ours = pair(MISTRAL)
        free = tokens(theirs, prompts(), **VARIED)
        ends = [free[0][23 + 3], free[1][23 + 7], free[2][23 + 5]]
        options = {**VARIED, "eos_token_id": ends, "return_dict_in_generate": True}
        expected = theirs.generate(**prompts(), **options)
        found = ours.generate(**numpy(prompts()), **options, **self.graph)
        assert np.asarray(found.sequences).tolist() == expected.sequences.tolist()
        assert 23 < found.sequences.shape[1] < 23 + NEW
        assert int(found.past_key_values.length) == found.sequences.shape[1] - 1, (
            "no step after the last token"
        )

    def test_sampling_is_determined_by_the_seed(self, pair: Pair) -> None:
        theirs, ours = pair(MISTRAL)
        sampling = {**OPTIONS, "max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_k": 0}

        def drawn(**more: Any) -> list[list[int]]:
            return tokens(ours, prompts(), **{**sampling, **self.graph, **more})

        first = drawn(seed=7)
        assert first == drawn(seed=7) == drawn(seed=7, **EAGER)
        assert first != drawn(seed=8)
        greedy = tokens(theirs, prompts(), **{**OPTIONS, "max_new_tokens": 8})
        assert drawn(top_k=1) == drawn(temperature=1e-4) == greedy
        assert len({tuple(row) for row in drawn(num_return_sequences=3)}) == 9

    def test_sampled_tokens_have_the_models_probabilities(self, pair: Pair) -> None:
        _, model = pair(MISTRAL)
        ids = ids_of(1, 6)
        logits = np.asarray(model(ids).logits, np.float64)[0, -1] / 2
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        sampling = {
            "do_sample": True,
            "temperature": 2.0,
            "top_k": 0,
            "num_return_sequences": 2000,
            "seed": 1,
        }
        found = tokens(model, {"input_ids": torch.tensor(ids)}, **sampling, max_new_tokens=1, **EAGER)
        share = np.bincount(np.array(found)[:, -1], minlength=VOCAB) / 2000
        # Four standard deviations of a share of 2000 draws.
        assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3).all()

    def test_sampled_beams_are_the_same_compiled_and_eager(self, pair: Pair) -> None:
        _, model = pair(MISTRAL)
        options = {**OPTIONS, **BEAMS, "do_sample": True, "top_p": 0.9, "return_dict_in_generate": True}
        graph, eager, other = (
            model.generate(**numpy(prompts()), **options, seed=seed, **mode)
            for seed, mode in ((3, self.graph), (3, EAGER), (4, self.graph))
        )
        for name in ("sequences", "beam_indices"):
            assert np.asarray(graph[name]).tolist() == np.asarray(eager[name]).tolist()
        assert graph.beam_indices.shape == (9, graph.sequences.shape[1] - 23)
        assert np.asarray(other.sequences).tolist() != np.asarray(graph.sequences).tolist()

    def test_nan_scores_raise(self, tmp_path: Path) -> None:
        theirs = reference(MISTRAL)
        with torch.no_grad():
            theirs.get_input_embeddings().weight.fill_(torch.nan)
        model = converted(theirs, self.prefix, tmp_path)
        for mode in (self.graph, EAGER):
            with pytest.raises(ValueError, match="no token can be drawn"):
                model.generate(ids_of(1, 6), do_sample=True, max_new_tokens=4, **mode)

    @pytest.mark.parametrize("mode", ["graph", "eager", "no cache"])
    def test_last_learned_position(self, mode: str, pair: Pair) -> None:
        """A sequence may use the last position and get one token more; the padding of its bucket does not count."""
        theirs, ours = pair(GPT_NEO)
        options = {"graph": self.graph, "eager": EAGER, "no cache": {"use_cache": False, **EAGER}}[mode]
        given = {"input_ids": torch.tensor(ids_of(1, 50))}
        most = {**VARIED, "max_new_tokens": 64 - 50 + 1}
        assert tokens(ours, given, **most, **options) == tokens(theirs, given, **most)
        with pytest.raises(ValueError, match="16 new tokens do not fit: the model has 64 learned positions"):
            tokens(ours, given, **{**VARIED, "max_new_tokens": 64 - 50 + 2}, **options)
