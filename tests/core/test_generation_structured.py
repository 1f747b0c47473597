"""How masks of a grammar act on scores, with a matcher that is written here."""

import numpy as np
import pytest
from fakes import constant

from monoblock.generation import structured
from monoblock.generation.arrays import NumpyOps

VOCAB, EOS = 10, 9


class Matcher:
    """Wants the tokens 3, 4, 5 in this order."""

    def __init__(self, taken=()):
        self.taken = list(taken)

    def is_error(self):
        return self.taken != [3, 4, 5][: len(self.taken)]

    def is_stopped(self):
        return self.is_error() or len(self.taken) == 3

    def deep_copy(self):
        return Matcher(self.taken)

    def consume_token(self, token):
        self.taken.append(token)

    def compute_bitmask(self):
        bits = np.zeros(32, dtype=np.uint8)
        bits[3 + len(self.taken)] = 1
        return np.packbits(bits, bitorder="little").tobytes()


@pytest.fixture
def wanted(monkeypatch):
    def made(ops, start, asked, *_):
        return asked and structured.Structured(ops, start, [EOS], lambda vocab: Matcher())

    monkeypatch.setattr(structured, "build", made)
    return {"response_format": "anything", "eos_token_id": EOS, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"do_sample": True, "seed": 1, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "seed": 1},
    ],
    ids=str,
)
def test_texts_keep_to_the_grammar_and_end(wanted, strategy):
    out = constant(np.arange(VOCAB)).generate([[1, 2], [3, 4]], **wanted, **strategy)
    assert all(row[2:] == [3, 4, 5, EOS] for row in out.tolist())


def test_one_prompt_with_guesses(wanted):
    out = constant(np.arange(VOCAB)).generate([[3, 4, 8, 3]], **wanted, prompt_lookup_num_tokens=3)
    assert out[0, 4:].tolist() == [3, 4, 5, EOS]


def test_other_bans_that_leave_nothing_are_said(wanted):
    with pytest.raises(ValueError, match="response_format leaves no token"):
        constant(np.arange(VOCAB)).generate([[1]], **wanted, suppress_tokens=[4])


def test_a_row_may_be_asked_about_twice():
    shape = structured.Structured(NumpyOps(), 1, [EOS], lambda vocab: Matcher())
    scores = np.zeros((2, VOCAB), dtype=np.float32)
    for ids, allowed in (([[7], [8]], [3, 3]), ([[7, 3], [8, 3]], [4, 4]), ([[7, 3], [8, 3]], [4, 4])):
        kept = shape(np.array(ids), scores)
        assert [np.flatnonzero(row > -np.inf).tolist() for row in kept] == [[token] for token in allowed]
