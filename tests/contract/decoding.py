"""The contract of what `generate` takes and returns beside tokens: streamers, scores and hidden states, given caches,
speculative decoding, guidance, chunked prefill, and its errors."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contract.models import Contract, Pair, ids_of, image_inputs, inputs, numpy, tokens
from measure import assert_close

from monoblock.errors import UnsupportedConfig
from monoblock.generation.resolve import UNSUPPORTED, UNSUPPORTED_ARGUMENTS

NAME = "MistralForCausalLM"
ATOL = 2e-5  # fp32, 2 layers; scores reach 10
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, "max_new_tokens": 8}
VARIED = {**OPTIONS, "no_repeat_ngram_size": 2}
EAGER: dict[str, Any] = {"disable_compile": True}
GUESSES: dict[str, dict[str, Any]] = {
    "lookup": {"prompt_lookup_num_tokens": 5},
    "suffix": {"speculation": "suffix"},
    "lookup without a cache": {"prompt_lookup_num_tokens": 5, "use_cache": False},
    "assistant": {"num_assistant_tokens": 3},
}
# Arguments that raise ValueError, and a part of the message.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    (
        {"cache_implementation": "static", "max_cache_len": 9},
        "the static cache has room for 9 tokens and up to 14 are needed",
    ),
    ({"token_type_ids": ids_of(1, 7)}, "token_type_ids"),
    ({"prefill_chunk_size": 0}, "prefill_chunk_size=0: expected"),
    ({"prefill_chunk_size": 2, "use_cache": False}, "cannot be combined with use_cache=False"),
    (
        {"prefill_chunk_size": 2, "return_dict_in_generate": True, "output_hidden_states": True},
        "cannot be combined with output_hidden_states=True",
    ),
    ({"bad_words_ids": [[5], [9999]]}, "holds the token 9999, but the model's vocabulary has the ids 0 to"),
]


def of(ids: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.as_tensor(np.asarray(ids))}


class DecodingContract(Contract):
    # The class of the output of a greedy search.
    output: str
    # Option -> why this backend raises, where the reason differs from PyTorch's.
    reasons: ClassVar[dict[str, str]]
    # As INVALID, for arguments of this backend alone.
    invalid: ClassVar[list[tuple[dict[str, Any], str]]] = []

    @pytest.fixture
    def chunk_sizes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """A list that grows by the number of tokens of each chunk of a prompt; one pass over a whole prompt fails."""
        raise NotImplementedError

    def programs(self, model: Any) -> Any:
        """A count of what has been compiled or traced so far."""
        raise NotImplementedError

    def test_streamer(self, pair: Pair) -> None:
        theirs, model = pair(NAME)
        got: list[Any] = []

        class Streamer:
            def put(self, value: Any) -> None:
                got.append(np.asarray(value).reshape(-1).tolist())

            def end(self) -> None:
                got.append("end")

        ids = ids_of(1, 7)
        found = tokens(model, of(ids), streamer=Streamer(), **VARIED, **self.graph)
        assert found == tokens(theirs, of(ids), **VARIED)
        assert got == [found[0][:7], *([token] for token in found[0][7:]), "end"]

    @pytest.mark.parametrize("cached", [True, False])
    def test_scores_hidden_states_and_attentions(self, cached: bool, pair: Pair) -> None:
        """Without the positions that pad a prompt to its bucket."""
        theirs, model = pair(NAME)
        given = inputs(NAME, "left")
        kinds = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        options = {**VARIED, "max_new_tokens": 3, "use_cache": cached, "return_dict_in_generate": True}
        options |= dict.fromkeys(kinds, True)
        expected = theirs.generate(**given, **options)
        found = model.generate(**numpy(given), **options, **self.graph)
        assert type(found).__name__ == self.output
        assert np.asarray(found.sequences).tolist() == expected.sequences.tolist()
        for name in ("scores", "logits"):
            for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
                np.testing.assert_allclose(a, b, atol=ATOL, err_msg=name)
        for step, (mine, other) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
            width = other[0].shape[1]
            mask = torch.nn.functional.pad(given["attention_mask"], (0, step), value=1)[:, -width:]
            for a, b in zip(mine, other, strict=True):
                assert_close("hidden states", a, b, ATOL, mask)
        for step, layers in enumerate(found.attentions):
            for weights in layers:
                assert weights.shape == (3, 6, 1 if step and cached else 23 + step, 23 + step)
                np.testing.assert_allclose(np.asarray(weights)[..., -1, :].sum(-1), 1, atol=1e-5)
        if not cached:
            last = np.asarray(found.attentions[-1][1])[:, :, -1]
            assert_close("attention weights", last, expected.attentions[-1][1][:, :, -1], ATOL)
        found = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        expected = theirs.compute_transition_scores(
            expected.sequences, expected.scores, normalize_logits=True
        )
        np.testing.assert_allclose(found, expected, atol=ATOL)

    def test_given_cache_holds_the_first_tokens_of_the_prompt(self, pair: Pair) -> None:
        """Its windowed layers have dropped keys, and it is too small: it is extended, and the given one unchanged."""
        theirs, model = pair(NAME)
        ids = ids_of(1, 31)
        options = {**VARIED, "suppress_tokens": [3], "max_new_tokens": 24}  # without pad tokens in the prompt
        first = model.generate(
            ids[:, :20], return_dict_in_generate=True, **{**options, "max_new_tokens": 8}, **self.graph
        )
        cache = first.past_key_values
        assert int(cache.length) == 27
        prompt = np.concatenate((np.asarray(first.sequences)[:, :28], ids[:, 27:]), axis=1)
        for _ in range(2):
            found = tokens(model, of(prompt), past_key_values=cache, **options, **EAGER)
            assert found == tokens(theirs, of(prompt), **options)
        with pytest.raises(ValueError, match="past_key_values hold 27 tokens and the prompt has 20"):
            model.generate(ids[:, :20], past_key_values=cache, **VARIED)

    @pytest.mark.parametrize("kind", GUESSES)
    def test_speculative_tokens_are_the_greedy_ones(self, kind: str, pair: Pair) -> None:
        """Past the window, from whose layers rejected tokens are removed."""
        theirs, model = pair(NAME)
        ids, options = ids_of(1, 20), {**OPTIONS, "max_new_tokens": 20}
        guesses = GUESSES[kind] | ({"assistant_model": model} if kind == "assistant" else {})
        found = tokens(model, of(ids), **options, **guesses, **EAGER)
        assert found == tokens(theirs, of(ids), **options)

    def test_speculative_decoding_up_to_the_last_learned_position(self, pair: Pair) -> None:
        """The padding of a block of guesses takes no position."""
        theirs, model = pair("GPTNeoForCausalLM")
        ids, options = ids_of(1, 40), {**OPTIONS, "max_new_tokens": 25}
        found = tokens(model, of(ids), prompt_lookup_num_tokens=5, **options, **EAGER)
        assert found == tokens(theirs, of(ids), **options)

    def test_classifier_free_guidance(self, pair: Pair) -> None:
        theirs, model = pair(NAME)
        ids, options = ids_of(1, 9), {**VARIED, "guidance_scale": 1.7}
        negative = torch.tensor(ids_of(1, 5, seed=4))
        expected = tokens(theirs, of(ids), negative_prompt_ids=negative, **options)
        assert expected != tokens(theirs, of(ids), **VARIED)
        found = tokens(model, of(ids), negative_prompt_ids=negative.numpy(), **options, **self.graph)
        assert found == expected

    # ------------------------------------------------------------------------ options

    def test_chunked_prefill(self, pair: Pair, chunk_sizes: list[int]) -> None:
        """Past the window and with padding; the last chunks are powers of two, so that few lengths are compiled."""
        theirs, model = pair(NAME)
        given, options = inputs(NAME, "left"), {**VARIED, **self.graph, "prefill_chunk_size": 6}
        assert tokens(model, given, **options) == tokens(theirs, given, **VARIED)
        assert chunk_sizes == [6, 6, 6, 4, 1]
        ids = of(ids_of(1, 23))
        assert tokens(model, ids, **options) == tokens(theirs, ids, **VARIED)
        before = self.programs(model)
        ids = of(ids_of(1, 29))
        assert tokens(model, ids, **options) == tokens(theirs, ids, **VARIED)
        assert self.programs(model) == before

    def test_chunked_prefill_after_a_given_cache(self, pair: Pair) -> None:
        theirs, model = pair(NAME)
        options = {**VARIED, "suppress_tokens": [3]}
        first = model.generate(ids_of(1, 9), return_dict_in_generate=True, **options, **self.graph)
        prompt = np.concatenate((np.asarray(first.sequences)[:, :16], ids_of(1, 15)), axis=1)
        found = tokens(
            model,
            of(prompt),
            past_key_values=first.past_key_values,
            prefill_chunk_size=4,
            **options,
            **self.graph,
        )
        assert found == tokens(theirs, of(prompt), **options)

    def test_chunked_prefill_of_images(self, pair: Pair) -> None:
        """A chunk may begin among an image's patches."""
        theirs, model = pair("FuyuForCausalLM")
        given = image_inputs((5, 3))
        found = tokens(model, given, prefill_chunk_size=3, **VARIED, **self.graph)
        assert found == tokens(theirs, given, **VARIED)

    def test_unsupported_options_raise(self, pair: Pair) -> None:
        theirs, model = pair(NAME)
        ids = ids_of(1, 7)
        for name, (_, reason) in (UNSUPPORTED | UNSUPPORTED_ARGUMENTS).items():
            reason = self.reasons.get(name, reason)
            with pytest.raises(UnsupportedConfig, match=f"{name}='else': .*{re.escape(reason)}"):
                model.generate(ids, **{**OPTIONS, name: "else"})
        for kind in ("dynamic", "static"):
            found = tokens(model, of(ids), cache_implementation=kind, **VARIED, **self.graph)
            assert found == tokens(theirs, of(ids), **VARIED)

    def test_invalid_arguments_raise(self, pair: Pair) -> None:
        model = pair(NAME)[1]
        for more, message in INVALID + self.invalid:
            with pytest.raises(ValueError, match=re.escape(message)):
                model.generate(ids_of(1, 7), **{**OPTIONS, **more}, **EAGER)
        with pytest.raises(ValueError, match="input_ids hold the token 1000, but the model's vocabulary has"):
            model.generate([[1000]], **OPTIONS)
        message = rf"{self.prefix}MistralModel has no language-model head: generate with a \.\.\.ForCausalLM"
        with pytest.raises(TypeError, match=message):
            pair("MistralModel")[1].generate(ids_of(1, 7))
        with pytest.raises(TypeError, match="no language-model head"):
            pair("MPNetForMaskedLM")[1].generate(ids_of(1, 7))
        with pytest.raises(TypeError, match="assistant_model must be one of monoblock's"):
            model.generate(ids_of(1, 7), assistant_model=pair(NAME)[0], **OPTIONS)
