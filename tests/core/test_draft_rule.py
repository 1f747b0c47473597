"""The rule that decides how many draft tokens are verified, with a clock and a cost model of the tests' own."""

import itertools
import random

import pytest
from fakes import TableModel, one_hot

from monoblock.generation import draft_rule
from monoblock.generation.draft_rule import (
    FORGETTING,
    LONGEST_WAIT,
    RATE,
    Acceptance,
    Draft,
    DraftRule,
    StepCosts,
)
from monoblock.generation.drafts import METHODS

VOCAB, PROMPT = 514, 20
# Time of a step of n tokens, of that of one: bound by memory, by memory up to 8 tokens, mixed, by arithmetic (no draft
# saves time).
COSTS = {
    "memory": lambda n: 1 + 0.02 * (n - 1),
    "eight": lambda n: 1 + 0.1 * max(0, n - 8),
    "mixed": lambda n: 1 + 0.1 * (n - 1),
    "half": lambda n: 1 + 0.4 * (n - 1),
    "arithmetic": lambda n: float(n),
}


def texts():
    rng = random.Random(0)
    rare = [rng.randrange(1, 512) for _ in range(600)]
    base = [rng.randrange(1, 512) for _ in range(300)]
    edited = [rng.randrange(1, 512) if i % 25 == 12 else token for i, token in enumerate(base)]
    trap = [token for _ in range(150) for token in (1, 2, rng.randrange(3, 512), rng.randrange(3, 512))]
    return {
        "new tokens only": (list(range(1, 501)), PROMPT),
        "random": (rare, PROMPT),
        "random, few tokens": ([1 + token % 20 for token in rare], PROMPT),
        "frequent words": (rng.choices(range(1, 301), [1 / i for i in range(1, 301)], k=600), PROMPT),
        "trap": (trap, PROMPT),  # a known pair of tokens, then others than the time before
        "edit": ([*base, 513, *edited], 301),
        "periodic": ([1, 2, 3, 4, 5, 6, 7] * 80, PROMPT),
    }


TEXTS = texts()


def speed(monkeypatch, name, cost, method, noise=lambda: 1.0):
    """Time of plain decoding of a text, divided by that with drafts; the tokens are checked."""
    text, prompt = TEXTS[name]
    now, spent = [0.0], [0.0]
    monkeypatch.setattr(draft_rule, "clock", lambda: now[0])
    model = TableModel(lambda ids: one_hot(text[len(ids)] if len(ids) < len(text) else 0, VOCAB))
    plain = model.decoder

    def decoder(plan, inputs):
        made = plain(plan, inputs)
        extend = made.extend

        def timed(ids_bk):
            spent[0] += cost(ids_bk.shape[1])
            now[0] += cost(ids_bk.shape[1]) * noise()
            return extend(ids_bk)

        made.extend = timed
        return made

    model.decoder = decoder
    new = len(text) - prompt
    out = model.generate([text[:prompt]], max_new_tokens=new, speculation=method, eos_token_id=None)
    assert out[0].tolist() == text
    return (new - 1) * cost(1) / spent[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_never_slower_than_plain_decoding_by_more_than_3_percent(method, cost, monkeypatch):
    found = {name: speed(monkeypatch, name, COSTS[cost], method) for name in TEXTS}
    assert min(found.values()) > 0.97, found
    if cost in ("memory", "eight"):
        assert found["edit"] > 4
        assert found["periodic"] > 8
    if cost == "mixed":
        assert found["edit"] > 3
        assert found["trap"] > 1.2
    if cost == "half":
        assert found["edit"] > 1.4


@pytest.mark.parametrize("method", METHODS)
def test_times_with_interruptions_do_not_switch_drafts_off(method, monkeypatch):
    """Half of all steps take 3 to 15 times as long, as on a machine with other work."""
    rng = random.Random(1)
    found = speed(monkeypatch, "edit", COSTS["mixed"], method, lambda: rng.choice([1, 1, 1, 1, 3, 5, 10, 15]))
    assert found > 2


def test_costs_are_the_least_of_recent_times():
    costs = StepCosts()
    assert not costs.known(1)
    assert costs.ratio(1, 2) == pytest.approx(1.06)  # the prior
    for seconds in (2.0, 9.0, 1.0):
        costs.seen(1, seconds)
    assert costs.known(1)
    costs.seen(4, 1.2, drafted=True)
    assert costs.ratio(1, 4) == pytest.approx(1.2)
    assert 1.0 < costs.ratio(1, 2) < costs.ratio(1, 3) < 1.2  # in between
    assert costs.ratio(1, 10) > 1.2 * 1.3  # beyond
    costs.seen(200, 30.0)
    assert costs.ratio(200, 201) < 1.01
    for _ in range(2 * FORGETTING):  # everything takes longer now
        costs.seen(1, 3.0)
    costs.seen(8, 3.3, drafted=True)
    assert costs.ratio(1, 8) == pytest.approx(1.1)
    assert 1 < costs.ratio(1, 4) < costs.ratio(1, 8)


def test_one_long_step_is_not_believed():
    costs = StepCosts()
    for _ in range(2):
        costs.seen(1, 1.0)
    costs.seen(6, 500.0, drafted=True)  # a compilation
    assert costs.ratio(1, 6) < 3
    assert costs.ratio(1, 6, hopeful=True) == pytest.approx(1.3)
    for _ in range(3):
        costs.seen(6, 500.0, drafted=True)
    assert costs.ratio(1, 6, hopeful=True) == 500


def measured(rule, base):
    for _ in range(2):
        rule.stepped(base, 0, 1, 0, 1.0)
    rule.balance = 4.0
    return rule


def draft_of(matched, count, share=1.0):
    return Draft(list(range(count)), matched=matched, shares=[share] * count)


def test_lengths_follow_the_probabilities_of_all_sequences():
    rule = measured(DraftRule(), 8)
    for _ in range(3):
        rule.stepped(8, 32, 8, 0, 1.5)
    rule.balance = 4.0
    sure, unsure, none = draft_of(20, 10), draft_of(1, 10, 0.2), Draft()
    lengths = rule.lengths([sure, unsure, none], [Acceptance() for _ in range(3)], 8, 8)
    assert lengths[0] > 5
    assert lengths[1:] == [0, 0]
    rule.balance = 0.0
    assert rule.lengths([sure], [Acceptance()], 8, 8) == [0]


def test_no_drafts_until_steps_without_are_measured_and_from_time_to_time():
    rule = DraftRule()
    draft = draft_of(20, 10)
    assert rule.lengths([draft], [Acceptance()], 1, 1) == [0]
    measured(rule, 1)
    lengths = []
    for _ in range(130):
        [length] = rule.lengths([draft], [Acceptance()], 1, 1)
        lengths.append(length)
        rule.stepped(1, length, 1, length, 1.0)
    assert lengths.count(0) == 2


def test_rejected_drafts_are_tried_ever_more_rarely():
    rule, acceptance = measured(DraftRule(), 1), Acceptance()
    draft, tried = draft_of(20, 10), []
    for step in range(2000):
        acceptance.waited()
        [length] = rule.lengths([draft], [acceptance], 1, 1)
        rule.stepped(1, length, 1, 0, 1.0 + 0.06 * length)
        if length:
            tried.append(step)
            acceptance.learn(draft.cut(length), 1, 0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert sum(0.06 for _ in tried) < RATE * 2000
    assert LONGEST_WAIT / 2 < min(gaps[-3:]) <= max(gaps[-3:]) <= LONGEST_WAIT
    before = acceptance.rate(20)
    acceptance.learn(draft.cut(4), 4, 4)
    assert acceptance.rate(20) > 2 * before
    assert not acceptance.due


def test_acceptance_is_learnt_by_length_of_the_match_and_from_other_sequences():
    parent = Acceptance()
    one, other = Acceptance(parent), Acceptance(parent)
    before = other.rate(1), other.rate(12)
    for _ in range(20):
        one.learn(draft_of(1, 1), 1, 0)
    assert one.rate(1) < other.rate(1) < before[0]
    assert other.rate(12) == before[1]
    assert one.chances(draft_of(12, 2, 0.5)) == pytest.approx([0.5 * before[1], (0.5 * before[1]) ** 2])
