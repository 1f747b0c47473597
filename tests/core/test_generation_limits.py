"""Limits of `generate` that are checked before any computation: vocabulary, positions, rows, memory, float32 range."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from fakes import TableModel, counting, one_hot

from monoblock import GenerationConfig, MptConfig, seeds
from monoblock.generation import limits, scores
from monoblock.generation.arrays import NumpyOps
from monoblock.generation.beams import BeamScorer

PROMPT = [[7, 8]]


def limited(vocab: int = 100, positions: int | None = 12, **fields: Any) -> TableModel:
    """A model that counts up; `fields` are those of its generation_config.json."""
    model = counting(vocab)
    model.vocab, model.max_positions = vocab, positions
    model.generation_config = GenerationConfig.from_dict(fields)
    return model


OUT_OF_VOCABULARY: dict[str, dict[str, Any]] = {
    "forced_bos_token_id": {"forced_bos_token_id": 100},
    "forced_eos_token_id": {"forced_eos_token_id": [3, 100]},
    "suppress_tokens": {"suppress_tokens": [100]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [100, 3]},
    "bad_words_ids": {"bad_words_ids": [[3], [4, 100]]},
    "sequence_bias": {"sequence_bias": {(3, 100): 1.0}},
    "sequence_bias of a file": {"sequence_bias": [[[100], 1.0]]},
    "eos_token_id": {"eos_token_id": [2, 100]},
}


@pytest.mark.parametrize("case", OUT_OF_VOCABULARY)
def test_ids_outside_the_vocabulary_are_refused(case: str) -> None:
    model, name = limited(), case.partition(" ")[0]
    with pytest.raises(ValueError, match=rf"{name} holds the token 100, but .* has the ids 0 to 99"):
        model.generate(PROMPT, max_new_tokens=2, **OUT_OF_VOCABULARY[case])
    with pytest.raises(ValueError, match=rf"{name} holds the token 100"):
        model.generate(PROMPT, GenerationConfig(**OUT_OF_VOCABULARY[case]), max_new_tokens=2)
    assert model.log == []


def test_an_eos_token_of_files_outside_the_vocabulary_is_ignored() -> None:
    """Tiny random models have their family's eos token id."""
    out = limited(eos_token_id=50256).generate([[7, 8], [1, 2]], max_new_tokens=2)
    assert out.tolist() == [[7, 8, 9, 10], [1, 2, 3, 4]]


def test_a_pad_token_outside_the_vocabulary_is_refused() -> None:
    rows = [[7, 8], [1, 2]]
    with pytest.raises(
        ValueError, match=r"filled with the token 100, but .* 0 to 99: set another pad_token_id"
    ):
        limited().generate(rows, max_new_tokens=2, eos_token_id=9, pad_token_id=100)
    with pytest.raises(ValueError, match="filled with the token 500"):
        limited(pad_token_id=500, eos_token_id=9).generate(rows, max_new_tokens=2)
    assert limited(pad_token_id=500).generate(PROMPT, max_new_tokens=2).shape == (
        1,
        4,
    )  # one row is never padded


@pytest.mark.parametrize(("ids", "message"), [([[7, 100]], "100, but"), ([[-1, 7]], "-1, but")])
def test_prompts_outside_the_vocabulary_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"input_ids hold the token {message} .*: is this the tokenizer"):
        limited().generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match=rf"negative_prompt_ids hold the token {message}"):
        limited().generate(PROMPT, max_new_tokens=2, negative_prompt_ids=ids, guidance_scale=2.0)


@pytest.mark.parametrize("mask", [[[math.nan, 1]], [[-1, 1]], [[-math.inf, 0]]])
def test_invalid_attention_masks_are_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask .* must be 1 for tokens and 0 for padding, got"):
        limited().generate(PROMPT, max_new_tokens=2, attention_mask=mask)


# ---------------------------------------------------------------------- positions

ROOM = "the model has 12 learned positions and the prompt takes 2 of them, so that at most 11 can follow"


def test_no_more_new_tokens_than_positions() -> None:
    model = limited()
    assert model.generate(PROMPT, max_new_tokens=11).shape == (1, 13)  # the last one is not fed back
    model.log.clear()
    for asked in ({"max_new_tokens": 12}, {"max_length": 14}, {"max_new_tokens": 12, "num_beams": 2}):
        with pytest.raises(ValueError, match=f"12 new tokens do not fit: {ROOM}"):
            model.generate(PROMPT, **asked)
        with pytest.raises(ValueError, match="12 new tokens do not fit"):
            model.generate(PROMPT, GenerationConfig(**asked))
    assert model.log == []


def test_prompts_longer_than_the_position_table_are_refused() -> None:
    assert limited().generate([list(range(12))], max_new_tokens=1).shape == (1, 13)
    for more in ({"max_new_tokens": 1}, {}):
        with pytest.raises(
            ValueError, match="the prompt has 13 tokens, and the model has 12 learned positions: shorten"
        ):
            limited().generate([list(range(13))], **more)


@pytest.mark.parametrize("own", [{}, {"max_length": 50}, {"max_new_tokens": 50}])
def test_length_limits_of_files_and_the_default_are_lowered_to_the_positions(own: dict[str, Any]) -> None:
    out = limited(**own).generate([list(range(5))])
    assert out.shape == (1, 12 if not own else 13)
    again = GenerationConfig.from_dict({"max_length": 50})  # a file's config, passed to the call
    assert limited().generate([list(range(5))], again).shape == (1, 13)


def test_padding_takes_no_position() -> None:
    padded = [[0, 0, 7, 8], [0, 4, 5, 6]]
    mask = [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert limited().generate(padded, attention_mask=mask, max_new_tokens=10).shape == (2, 14)
    with pytest.raises(ValueError, match="the prompt takes 3 of them, so that at most 10 can follow"):
        limited().generate(padded, attention_mask=mask, max_new_tokens=11)


def test_position_ids_count() -> None:
    model = limited()
    model.input_names = frozenset({"position_ids"})
    with pytest.raises(ValueError, match="takes 8 of them, so that at most 5 can follow"):
        model.generate(PROMPT, position_ids=np.array([[6, 7]]), max_new_tokens=6)


def test_negative_prompts_are_limited_by_the_positions() -> None:
    with pytest.raises(ValueError, match="the negative prompt takes 9 of them, so that at most 4 can follow"):
        limited().generate(PROMPT, max_new_tokens=5, negative_prompt_ids=[list(range(9))], guidance_scale=2.0)


def test_models_without_learned_positions_have_no_limit() -> None:
    assert limited(positions=None).generate(PROMPT, max_new_tokens=50).shape == (1, 52)


# ---------------------------------------------------------------------- rows, memory, numbers


@pytest.mark.parametrize("more", [{"num_beams": 10**7}, {"num_return_sequences": 10**12, "do_sample": True}])
def test_too_many_rows_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"sequences for each of 1 prompts are .* rows, more than the 65536 of a call"
    ):
        limited().generate(PROMPT, max_new_tokens=1, **more)


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MptConfig(d_model=32, n_heads=4, n_layers=2).to_spec()  # 2 x 2 x 32 values for each token
    monkeypatch.setattr(limits, "host_memory", lambda: 2**30)
    limits.check_memory(spec, rows=2, tokens=2**20, itemsize=4)
    with pytest.raises(
        ValueError, match=r"a cache of 1048577 tokens for 2 rows takes 1 GiB, and this machine has 1"
    ):
        limits.check_memory(spec, rows=2, tokens=2**20 + 1, itemsize=4)
    limits.check_memory(spec, rows=2, tokens=2**20 + 1, itemsize=4, times=4)
    monkeypatch.setattr(limits, "host_memory", lambda: None)
    limits.check_memory(spec, rows=2, tokens=2**40, itemsize=4)


OUT_OF_RANGE: dict[str, list[Any]] = {
    **{f"{which}_{what}": [10**12, 2**31] for which in ("min", "max") for what in ("length", "new_tokens")},
    "max_cache_len": [10**12],
    "prefill_chunk_size": [10**30],
    "max_matching_ngram_size": [10**12],
    "temperature": [1e-300, 1e300, 10**400, math.inf, math.nan],
    "repetition_penalty": [1e-300, 1e300, 10**400],
    "encoder_repetition_penalty": [1e300],
    "length_penalty": [1e300, -1e300, 101],
    "guidance_scale": [1e300, math.inf],
    "exponential_decay_length_penalty": [(0, 1e300), (0, 0.0), (0, math.nan)],
    "sequence_bias": [{(5,): math.nan}, {(5,): math.inf}],
    "forced_eos_token_id": [-1, [-1]],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_values_beyond_float32_or_memory_are_refused(name: str) -> None:
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=rf"GenerationConfig.{name}=.*: expected .*") as caught:
            limited().generate(PROMPT, do_sample=True, **{name: value})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("k", [10**12, 10**30])
def test_top_k_above_the_vocabulary(k: int) -> None:
    assert limited().generate(PROMPT, max_new_tokens=2, do_sample=True, seed=0, top_k=k).shape == (1, 4)


def test_powers_stay_finite() -> None:
    """1.9 ** 2000 overflows, and infinity times a score of 0 would be NaN."""
    ops = NumpyOps()
    assert scores.power(ops, 1.9, 2000) == 1e30
    assert scores.power(ops, 1.5, 3) == 1.5**3
    model = TableModel(lambda ids: one_hot((ids[-1] + 1) % 100, 100) * 0)
    out = model.generate(
        PROMPT, max_new_tokens=1500, eos_token_id=2, exponential_decay_length_penalty=(0, 1.9)
    )
    assert out.shape == (1, 1502)  # scores of 0 do not grow
    rules = BeamScorer(width=2, length_penalty=100.0, early_stopping=False, longest=10**6)
    assert rules.norm(10**6) == 1e30
    assert BeamScorer(2, 50.0, False, 9).norm(3) == 3.0**50
    assert BeamScorer(2, -100.0, False, 9).norm(10**6) == 1e-30


# ---------------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed", [10**23, -(10**23), "7", 1.5, True])
def test_invalid_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits"):
        limited().generate(PROMPT, max_new_tokens=1, do_sample=True, seed=seed)
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits"):
        seeds.set_seed(seed)


def test_seeds_at_the_ends_of_the_range() -> None:
    state = random.getstate()
    for seed in (seeds.MIN_SEED, -1, 0, np.int64(3), seeds.MAX_SEED):
        seeds.set_seed(int(seed))
        assert seeds.checked_seed(seed) == int(seed)
        assert -(2**63) <= seeds.signed(int(seed)) < 2**63
    random.setstate(state)
    assert seeds.signed(seeds.MAX_SEED) == -1
    assert seeds.advance(seeds.MAX_SEED, 1) == 0
    assert seeds.advance(4, 2) == 6
