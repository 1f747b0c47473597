"""Stop strings and the hub's criteria."""

import numpy as np
import pytest
from fakes import TableModel, one_hot
from text_tokenizers import byte_fallback, byte_level, bytes_of

from monoblock.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)


def says(tokenizer, prompt, reply, stop, **arguments):
    """The text of what is generated when a model would say `reply` and `stop` is to stop it."""
    start, ids = tokenizer.encode(prompt).ids, tokenizer.encode(reply).ids
    model = TableModel(lambda row: one_hot(ids[len(row) - len(start)], tokenizer.get_vocab_size()))
    out = model.generate(
        [start], max_new_tokens=len(ids), stop_strings=stop, tokenizer=tokenizer, **arguments
    )
    return tokenizer.decode(out[0, len(start) :].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("merged", "stop", "expected"),
    [
        ((), "stop", "now stop"),
        ((), ["never", "top"], "now stop"),
        ((), ["stop", "ow"], "now"),
        (("st", "op"), "stop", "now stop"),
        (("opp",), "stop", "now stopp"),  # the string ends inside a token
        (("w st",), "stop", "now stop"),  # and begins inside one
        (("w stopper",), "top", "now stopper"),
        ((), "missing", "now stopper é世"),
        ((), "é", "now stopper é"),
        ((), "世", "now stopper é世"),
        ((" ",), " ", "now "),
    ],
)
def test_a_string_stops_with_the_token_that_completes_it(merged, stop, expected):
    assert says(byte_level(*merged), "> ", "now stopper é世", stop) == expected


def test_a_string_that_the_prompt_holds_already_does_not_stop():
    assert says(byte_level(), "Q: stop\n\n", "A: go\n\nQ:", "\n\n") == "A: go\n\n"
    assert says(byte_level(), "stop", "xyz", "stop") == "xyz"


def test_a_string_may_begin_in_the_prompt():
    assert says(byte_level(), "line\n", "\nmore", "\n\n") == "\n"


def test_special_tokens_are_text_for_stop_strings():
    assert says(byte_level(), "a", "b<eos>c", "<eos>") == "b<eos>"


def test_each_row_stops_for_itself():
    tokenizer = byte_level()
    ids = [tokenizer.encode(text).ids for text in ("xxxx.", ".")]
    model = TableModel(lambda row: one_hot(ids[0][0] if row[0] == ids[0][0] else ids[1][0], 300))
    out = model.generate(
        [ids[0][:1], ids[1]], max_new_tokens=3, stop_strings=["."], tokenizer=tokenizer, pad_token_id=0
    )
    x, dot = ids[0][0], ids[1][0]
    assert out.tolist() == [[x, x, x, x], [dot, dot, 0, 0]]


def test_leading_spaces_and_bytes_of_a_metaspace_tokenizer():
    tokenizer = byte_fallback("▁Hello", "▁world", "▁")
    hello, world = tokenizer.token_to_id("▁Hello"), tokenizer.token_to_id("▁world")
    wave = bytes_of(tokenizer, "👋")
    criteria = StopStringCriteria(tokenizer, [" world", "👋"])
    assert criteria.after([[hello], [hello, world], [hello, *wave[:3]], [hello, *wave]]) == [
        False,
        True,
        False,
        True,
    ]


class Strict:
    """A tokenizer whose `decode` takes ids and nothing else."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_any_object_with_decode_will_do():
    criteria = StopStringCriteria(Strict(), "ab")
    assert criteria.after([[97, 98], [98, 97], [97, 98, 99]]) == [True, False, False]


def test_criteria_of_the_hub_work_on_their_own():
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    assert MaxLengthCriteria(3)(ids, None) == [True, True]
    assert MaxLengthCriteria(max_length=4)(ids, None) == [False, False]
    assert EosTokenCriteria([6, 9])(ids, None) == [False, True]
    assert EosTokenCriteria(eos_token_id=3)(ids, None) == [True, False]
    assert MaxTimeCriteria(1e9)(ids, None) == [False, False]
    assert MaxTimeCriteria(1.0, initial_timestamp=0.0)(ids, None) == [True, True]
    both = StoppingCriteriaList([EosTokenCriteria(3), EosTokenCriteria(6)])
    assert both(ids, None) == [True, True]
    assert StoppingCriteriaList()(ids, None) == [False, False]
    assert StoppingCriteriaList([EosTokenCriteria(3), MaxLengthCriteria(7)]).max_length == 7
    with pytest.raises(ValueError, match="returned 3 values"):
        StoppingCriteriaList([lambda i, s: [True] * 3])(ids, None)


def test_criteria_of_the_hub_in_a_call():
    model = TableModel(lambda row: one_hot(row[-1] + 1, 50))
    assert model.generate(
        [[1], [2]], stopping_criteria=[MaxLengthCriteria(4), MaxTimeCriteria(99)]
    ).shape == (2, 4)
    out = model.generate(
        [[1], [2]], stopping_criteria=[EosTokenCriteria([4])], max_new_tokens=4, pad_token_id=0
    )
    assert out.tolist() == [[1, 2, 3, 4], [2, 3, 4, 0]]
