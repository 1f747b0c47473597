"""Beam search on a table of scores, compared with exhaustive search, and its calls of the decoder."""

import itertools

import numpy as np
import pytest
from fakes import TableModel, constant, counting

from monoblock.generation import GenerationConfig
from monoblock.generation.arrays import NumpyOps
from monoblock.generation.outputs import GenerateBeamDecoderOnlyOutput

VOCAB = 4
TABLE = np.random.default_rng(8).normal(size=(VOCAB, VOCAB, VOCAB)) * 2
EOS = 3


def model():
    return TableModel(lambda ids: TABLE[ids[-2], ids[-1]])


def log_softmax(scores):
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


def all_continuations(prompt, length, eos=None):
    """Every continuation of `length` tokens, or fewer with a final eos, and its log-probability."""
    for new in itertools.product(range(VOCAB), repeat=length):
        end = new.index(eos) + 1 if eos in new else length
        if any(token != 0 for token in new[end:]):
            continue  # a duplicate
        ids, total = list(prompt), 0.0
        for token in new[:end]:
            total += log_softmax(TABLE[ids[-2], ids[-1]])[token]
            ids.append(token)
        yield new[:end], total


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [None, EOS])
def test_wide_beam_search_equals_exhaustive_search(penalty, eos):
    for prompt in ([0, 1], [2, 2], [1, 0]):
        ranked = sorted(
            all_continuations(prompt, 4, eos), key=lambda new: new[1] / len(new[0]) ** penalty, reverse=True
        )
        out = model().generate(
            [prompt],
            max_new_tokens=4,
            num_beams=64,
            num_return_sequences=5,
            length_penalty=penalty,
            early_stopping="never",
            eos_token_id=eos,
            pad_token_id=9,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = [tuple(t for t in row[2:] if t != 9) for row in out.sequences.tolist()]
        assert found == [new for new, _ in ranked[:5]]
        expected = [total / len(new) ** penalty for new, total in ranked[:5]]
        np.testing.assert_allclose(out.sequences_scores, expected, rtol=1e-5)  # float32 sums of four


def test_one_beam_is_greedy_and_more_beams_score_no_worse():
    def score(row):
        ids, total = row[:2], 0.0
        for token in row[2:]:
            total += log_softmax(TABLE[ids[-2], ids[-1]])[token]
            ids.append(token)
        return total

    prompt = [[0, 1], [1, 2], [2, 0]]
    greedy = model().generate(prompt, max_new_tokens=6).tolist()
    assert model().generate(prompt, max_new_tokens=6, num_beams=1).tolist() == greedy
    wide = model().generate(prompt, max_new_tokens=6, num_beams=3).tolist()
    for beam, row in zip(wide, greedy, strict=True):
        assert score(beam) >= score(row) - 1e-9


def test_prompts_are_computed_once_and_the_cache_is_reordered_with_the_beams():
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    decoder = model()
    out = decoder.generate([[0, 1], [1, 2]], max_new_tokens=5, num_beams=2, **wanted)
    assert isinstance(out, GenerateBeamDecoderOnlyOutput)
    assert decoder.log[:2] == [("prefill", [[0, 1], [1, 2]], None), ("reorder", [0, 0, 1, 1])]
    assert [entry[0] for entry in decoder.log].count("step") == 4
    # With beam_indices the scores of the tokens add up to the score of the sequence.
    for row, rows, total in zip(out.sequences[:, 2:], out.beam_indices, out.sequences_scores, strict=True):
        steps = [
            out.scores[step][beam, token] for step, (token, beam) in enumerate(zip(row, rows, strict=True))
        ]
        assert sum(steps) / 5 == pytest.approx(float(total), rel=1e-5)


def test_finished_beams_are_padded_to_the_longest():
    scores = np.log([0.3, 0.25, 0.05, 0.4])
    out = constant(scores).generate(
        [[0, 1]],
        max_new_tokens=30,
        num_beams=3,
        num_return_sequences=3,
        eos_token_id=EOS,
        pad_token_id=7,
        early_stopping=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[1] < 30  # early_stopping: once three beams are finished
    for row, rows in zip(out.sequences[:, 2:].tolist(), out.beam_indices.tolist(), strict=True):
        end = row.index(EOS) + 1
        assert set(row[end:]) <= {7}
        assert rows[end:] == [-1] * len(row[end:])
        assert min(rows[:end]) >= 0


def test_stopping_criteria_and_stop_strings_end_single_beams():
    class Letters:
        def decode(self, ids):
            return "".join("abcd"[id] for id in ids)

    out = model().generate(
        [[0, 1]],
        max_new_tokens=8,
        num_beams=3,
        num_return_sequences=3,
        stop_strings="c",
        tokenizer=Letters(),
        pad_token_id=9,
        early_stopping=True,
    )
    for row in out.tolist():
        new = [id for id in row[2:] if id != 9]
        assert 2 not in new[:-1]
    shapes = []
    criterion = lambda ids, scores: shapes.append(ids.shape) or ids[:, -1] == 2  # noqa: E731
    again = model().generate(
        [[0, 1]],
        max_new_tokens=8,
        num_beams=3,
        num_return_sequences=3,
        stopping_criteria=[criterion],
        pad_token_id=9,
        early_stopping=True,
    )
    assert again.tolist() == out.tolist()
    assert shapes[0] == (6, 3)  # twice as many candidates as beams


def test_logits_processors_get_the_ids_of_each_beam():
    calls = []

    def spy(ids, scores):
        calls.append(ids.tolist())
        return scores

    out = model().generate([[0, 1]], max_new_tokens=4, num_beams=2, logits_processor=[spy])
    assert [np.shape(ids) for ids in calls] == [(2, n) for n in (2, 3, 4, 5)]
    assert out[0, :-1].tolist() in calls[-1]


def test_beam_sampling_is_reproducible_with_a_seed():
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    flat = constant(np.zeros(50))
    first, again, other = (flat.generate([[0, 1]], seed=s, **options).tolist() for s in (1, 1, 2))
    assert first == again != other


def test_draws_without_replacement_follow_the_softmax():
    """Two of three: the pair (i, j) with probability p_i * p_j / (1 - p_i)."""
    ops, p = NumpyOps(), np.array([0.5, 0.3, 0.2])
    scores = np.log(np.tile(p, (20000, 1))).astype(np.float32)
    index = ops.draw(scores, 2, ops.generator(0))
    for i, j in itertools.permutations(range(3), 2):
        frequency = ((index[:, 0] == i) & (index[:, 1] == j)).mean()
        assert frequency == pytest.approx(
            p[i] * p[j] / (1 - p[i]), abs=0.015
        )  # 4 standard deviations of 20,000 draws


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon'"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty='long'"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 4}, "cannot be combined"),
        ({"num_beams": 2, "assistant_model": counting()}, "cannot be combined"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beam_groups=2: diverse beam search is not implemented"),
        ({"num_return_sequences": 2}, "set do_sample=True or num_beams"),
        (
            {"num_beams": 2, "streamer": type("S", (), {"put": print, "end": lambda self: None})()},
            "one sequence",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        counting().generate([[1]], max_new_tokens=4, **arguments)


def test_beam_search_fields_without_beams_are_logged(caplog):
    counting().generate([[1]], max_new_tokens=2, length_penalty=2.0)
    assert "length_penalty=2.0 has no effect without num_beams > 1" in caplog.text
    config = GenerationConfig(num_beams=2, length_penalty=2.0, max_new_tokens=2)
    caplog.clear()
    counting().generate([[1]], config)
    assert not caplog.messages


def test_sequences_without_possible_tokens_hold_the_prompt():
    """Only one continuation is allowed."""
    out = counting().generate(
        [[1]],
        max_new_tokens=3,
        num_beams=3,
        num_return_sequences=3,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda prompt, ids: [int(ids[-1]) + 1],
    )
    assert out[0].tolist() == [1, 2, 3, 4]
    assert out.shape == (3, 4)
