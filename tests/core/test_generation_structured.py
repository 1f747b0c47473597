"""Structured generation: token masks of a grammar, from a minimal matcher, applied to scores."""

import numpy as np
import pytest
from fakes import constant

from monoblock.generation import structured
from monoblock.generation.arrays import NumpyOps

VOCAB, EOS = 10, 9


class Matcher:
    """Accepts the tokens 3, 4, 5 in this order."""

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
def options(monkeypatch):
    def build(ops, start, response_format, *_):
        return response_format and structured.Structured(ops, start, [EOS], lambda vocab: Matcher())

    monkeypatch.setattr(structured, "build", build)
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
def test_outputs_match_the_grammar_and_end_with_eos(options, strategy):
    out = constant(np.arange(VOCAB)).generate([[1, 2], [3, 4]], **options, **strategy)
    assert all(row[2:] == [3, 4, 5, EOS] for row in out.tolist())


def test_prompt_lookup_decoding(options):
    out = constant(np.arange(VOCAB)).generate([[3, 4, 8, 3]], **options, prompt_lookup_num_tokens=3)
    assert out[0, 4:].tolist() == [3, 4, 5, EOS]


def test_suppressing_all_allowed_tokens_is_an_error(options):
    with pytest.raises(ValueError, match="response_format leaves no token"):
        constant(np.arange(VOCAB)).generate([[1]], **options, suppress_tokens=[4])


def test_repeated_calls_for_a_row_are_idempotent():
    processor = structured.Structured(NumpyOps(), 1, [EOS], lambda vocab: Matcher())
    scores = np.zeros((2, VOCAB), dtype=np.float32)
    for ids, allowed in (([[7], [8]], [3, 3]), ([[7, 3], [8, 3]], [4, 4]), ([[7, 3], [8, 3]], [4, 4])):
        masked = processor(np.array(ids), scores)
        assert [np.flatnonzero(row > -np.inf).tolist() for row in masked] == [[token] for token in allowed]
