"""Beam search on tables: against all texts there are, and what it asks of a decoder."""

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


def all_texts(prompt, length, eos=None):
    """Every text of at most that many new tokens that ends as texts do, with its log-probability."""
    for new in itertools.product(range(VOCAB), repeat=length):
        end = new.index(eos) + 1 if eos in new else length
        if any(token != 0 for token in new[end:]):
            continue  # the same text once more
        ids, total = list(prompt), 0.0
        for token in new[:end]:
            total += log_softmax(TABLE[ids[-2], ids[-1]])[token]
            ids.append(token)
        yield new[:end], total


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [None, EOS])
def test_enough_beams_find_the_best_of_all_texts(penalty, eos):
    for prompt in ([0, 1], [2, 2], [1, 0]):
        ranked = sorted(
            all_texts(prompt, 4, eos), key=lambda text: text[1] / len(text[0]) ** penalty, reverse=True
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
        assert found == [text for text, _ in ranked[:5]]
        expected = [total / len(text) ** penalty for text, total in ranked[:5]]
        np.testing.assert_allclose(out.sequences_scores, expected, rtol=1e-5)  # float32 sums of four


def test_one_beam_is_greedy_and_more_are_no_worse():
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
    for mine, theirs in zip(wide, greedy, strict=True):
        assert score(mine) >= score(theirs) - 1e-9


def test_a_prompt_is_computed_once_and_its_cache_follows_the_beams():
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    made = model()
    out = made.generate([[0, 1], [1, 2]], max_new_tokens=5, num_beams=2, **wanted)
    assert isinstance(out, GenerateBeamDecoderOnlyOutput)
    assert made.log[:2] == [("prefill", [[0, 1], [1, 2]], None), ("reorder", [0, 0, 1, 1])]
    assert [entry[0] for entry in made.log].count("step") == 4
    # beam_indices say where each token's score is: summed up they are the sequence's.
    for row, rows, total in zip(out.sequences[:, 2:], out.beam_indices, out.sequences_scores, strict=True):
        steps = [
            out.scores[step][beam, token] for step, (token, beam) in enumerate(zip(row, rows, strict=True))
        ]
        assert sum(steps) / 5 == pytest.approx(float(total), rel=1e-5)


def test_texts_that_end_early_are_filled_and_cut_to_the_longest():
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
    assert out.sequences.shape[1] < 30  # it stopped as soon as three texts had ended
    for row, rows in zip(out.sequences[:, 2:].tolist(), out.beam_indices.tolist(), strict=True):
        end = row.index(EOS) + 1
        assert set(row[end:]) <= {7}
        assert rows[end:] == [-1] * len(row[end:])
        assert min(rows[:end]) >= 0


def test_own_criteria_and_stop_strings_end_single_texts():
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
        text = [id for id in row[2:] if id != 9]
        assert 2 not in text[:-1]
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


def test_processors_see_each_beams_text():
    seen = []

    def spy(ids, scores):
        seen.append(ids.tolist())
        return scores

    out = model().generate([[0, 1]], max_new_tokens=4, num_beams=2, logits_processor=[spy])
    assert [np.shape(ids) for ids in seen] == [(2, n) for n in (2, 3, 4, 5)]
    assert out[0, :-1].tolist() in seen[-1]


def test_a_seed_repeats_beam_sampling():
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
        share = ((index[:, 0] == i) & (index[:, 1] == j)).mean()
        assert share == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.015)  # four deviations of 20,000 draws


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
def test_bad_input_is_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        counting().generate([[1]], max_new_tokens=4, **arguments)


def test_beam_fields_without_beams_are_said(caplog):
    counting().generate([[1]], max_new_tokens=2, length_penalty=2.0)
    assert "length_penalty=2.0 has no effect without num_beams > 1" in caplog.text
    config = GenerationConfig(num_beams=2, length_penalty=2.0, max_new_tokens=2)
    caplog.clear()
    counting().generate([[1]], config)
    assert not caplog.messages


def test_where_nothing_is_possible_the_rest_stays_empty():
    """One text only can be written: the places of the others hold the prompt."""
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
