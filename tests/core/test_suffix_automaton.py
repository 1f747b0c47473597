"""Suffix automata against a brute-force search, and their bounds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monoblock.generation.draft_rule import Acceptance
from monoblock.generation.drafts import SuffixDrafts
from monoblock.generation.suffix_automaton import (
    CONTEXT,
    NONE,
    SEGMENTS,
    WALK,
    IndexMatches,
    SuffixAutomaton,
    SuffixIndex,
    SuffixMatch,
)

# Few different tokens, so that they repeat; at most WALK tokens, so that all counts are exact.
TEXTS = st.integers(1, 4).flatmap(lambda k: st.lists(st.integers(0, k - 1), max_size=WALK - 2))


def automaton_of(text):
    made = SuffixAutomaton()
    for token in text:
        made.append(token)
    return made


def occurs(text, part):
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def longest_suffix(text, other):
    return next(n for n in range(len(text), -1, -1) if occurs(other, text[len(text) - n :]))


@given(TEXTS)
def test_longest_suffix_that_occurred_before(text):
    made = SuffixAutomaton()
    for end, token in enumerate(text, start=1):
        made.append(token)
        assert made.repeated()[1] == longest_suffix(text[1:end], text[: end - 1])


@given(TEXTS)
def test_counts_of_what_followed_every_substring(text):
    made = automaton_of(text)
    for start, end in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        part, state = text[start:end], 0
        for token in part:
            state = made.step(state, token)
        after = [text[i + len(part)] for i in range(len(text) - len(part)) if text[i : i + len(part)] == part]
        assert made.total[state] == len(after)
        if not after:
            assert made.first[state] == NONE
            continue
        most = max(map(after.count, after))
        assert (made.count[state], after.count(made.first[state])) == (most, most)
        # Of equal counts, the token that reached it last.
        last = [t for i, t in enumerate(after) if after.count(t) == most and t not in after[i + 1 :]]
        assert made.first[state] == last[-1]
    assert len(made.length) <= 2 * len(text) + 1  # the bound of Blumer et al.


@given(TEXTS, TEXTS, st.integers(0, 20))
def test_match_in_another_text_that_grows(other, text, before):
    """States are split after the match has reached them."""
    made = automaton_of(other[:before])
    match = SuffixMatch(made)
    for end, token in enumerate(text, start=1):
        match.append(token)
        state = 0
        for part in text[end - match.length : end]:
            state = made.step(state, part)
        assert state == match.current()
        if end <= len(other) - before:
            made.append(other[before + end - 1])
        else:
            assert match.length <= longest_suffix(text[:end], other)
    finished = SuffixMatch(automaton_of(other))
    for token in text:
        finished.append(token)
    assert finished.length == longest_suffix(text, other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], [3, 9, 1, 2, 3]),  # past the end it continues periodically
        ([7, 7, 7], [7, 7, 7, 7, 7]),
        ([1, 5, 1, 6, 1, 5, 8, 1], [5, 8, 1, 5, 8]),  # 5 followed 1 twice, 6 once
        ([1, 2, 3], []),
    ],
)
def test_continuation(text, expected):
    made = automaton_of(text)
    state, matched = made.repeated()
    tokens, shares = made.continuation(state, 5, 0.01) if matched else ([], [])
    assert tokens == expected
    assert len(shares) == len(tokens)
    assert all(0 < share <= 1 for share in shares)


def test_continuation_ends_where_it_is_improbable():
    made = automaton_of([token for n in range(10) for token in (1, 10 + n)] + [1])
    tokens, shares = made.continuation(made.step(0, 1), 5, 0.05)
    assert (tokens, shares) == ([19, 1], [0.1, 1.0])


def test_index_drops_the_oldest_texts_and_stays_within_its_capacity():
    index = SuffixIndex(400)
    for number in range(100):
        index.add([1000 + number] * 10 + [number] * 20)
        assert index.tokens <= 400
        assert len(index.segments) <= SEGMENTS
    matches = IndexMatches(index)
    assert max(match.length for match in matches.of([99] * 20)) == 20
    assert all(match.length == 0 for match in IndexMatches(index).of([5] * 20))
    index.add(list(range(10_000)))  # longer than a segment: its end
    assert index.tokens <= 400
    assert max(match.length for match in matches.of([*[99] * 20, *range(9_990, 10_000)])) == 10


def test_matches_go_on_while_texts_are_added():
    index, text = SuffixIndex(1000), [1, 2, 3, 4, 5, 6, 7, 8]
    early = IndexMatches(index)
    assert list(early.of(text[:4])) == []
    index.add([9, 3, 4, 5, 6, 0])
    [match] = early.of(text[:6])
    assert match.length == 4
    index.add([2, 3, 4, 5, 6, 7, 5])
    assert [match.length for match in early.of(text[:7])] == [5]  # it began before the longer one was there
    assert CONTEXT >= 8
    assert [match.length for match in IndexMatches(index).of(text[:7])] == [6]


def test_texts_do_not_continue_in_the_next_one():
    index = SuffixIndex(1000)
    index.add([1, 2, 3])
    index.add([4, 5, 6])
    source = SuffixDrafts(8, Acceptance(), index)
    assert source.propose([9, 1, 2], 8).tokens == [3]


def test_a_sequence_keeps_a_bounded_number_of_tokens(monkeypatch):
    monkeypatch.setattr("monoblock.generation.drafts.MOST_TOKENS", 100)
    source, ids = SuffixDrafts(4, Acceptance()), [0]
    for count in (40, 30, 900):  # in one piece, then one by one; at last more than fits
        ids += [(ids[-1] + i + 1) % 20 for i in range(count)]
        for _ in range(150):
            assert source.propose(ids, 4).tokens == [(ids[-1] + i + 1) % 20 for i in range(4)]
            assert source.own.tokens <= 100
            ids.append((ids[-1] + 1) % 20)


def test_feeding_in_parts():
    source = SuffixDrafts(4, Acceptance())
    ids = [1, 2, 3, 4, 5] * 4
    assert not source.feed(ids, 15)
    assert source.feed(ids, 15)
    assert source.propose(ids, 4).tokens == [1, 2, 3, 4]
    assert source.own.tokens == 20
