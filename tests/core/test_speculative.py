"""Speculative decoding on a table of scores: same tokens and same distribution as decoding without drafts."""

import itertools
from collections import Counter

import numpy as np
import pytest
from fakes import TableModel, counting, one_hot

from monoblock.errors import UnsupportedConfig
from monoblock.generation import GenerationConfig
from monoblock.generation.drafts import PromptLookup
from monoblock.generation.speculative import LONGEST_DRAFT, Assistant

VOCAB = 7
RNG = np.random.default_rng(4)
TABLE = RNG.normal(size=(VOCAB, VOCAB, VOCAB)) * 1.5  # scores after two tokens


def order_two(table):
    return TableModel(lambda ids: table[ids[-2], ids[-1]])


def blurred(seed, noise):
    """The target model with noise, whose drafts are partly accepted."""
    return order_two(TABLE + np.random.default_rng(seed).normal(size=TABLE.shape) * noise)


SOURCES = {
    "lookup": lambda: {"prompt_lookup_num_tokens": 4},
    "lookup-long": lambda: {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 3},
    "suffix": lambda: {"speculation": "suffix"},
    "ruled lookup": lambda: {"speculation": "lookup"},
    "same": lambda: {"assistant_model": order_two(TABLE), "assistant_confidence_threshold": 0.0},
    "near": lambda: {"assistant_model": blurred(1, 0.5), "num_assistant_tokens": 5},
    "far": lambda: {
        "assistant_model": blurred(2, 4.0),
        "num_assistant_tokens": 2,
        "num_assistant_tokens_schedule": "heuristic_transient",
    },
}
CALLS = [
    {},
    {"eos_token_id": [3, 5]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"bad_words_ids": [[2], [1, 4]], "min_new_tokens": 5, "eos_token_id": 6},
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fields", CALLS, ids=str)
def test_greedy_tokens_equal_decoding_without_drafts(source, fields):
    for first, second in itertools.product(range(VOCAB), repeat=2):
        plain = order_two(TABLE).generate([[first, second]], max_new_tokens=25, **fields)
        drafted = order_two(TABLE).generate(
            [[first, second]], max_new_tokens=25, **fields, **SOURCES[source]()
        )
        assert drafted.tolist() == plain.tolist()


def chi_square(counts, probabilities, draws):
    """The statistic and the number of cells; cells expected fewer than 5 times are merged into one."""
    expected = {cell: p * draws for cell, p in probabilities.items()}
    large = [cell for cell, e in expected.items() if e >= 5]
    cells = [(counts[cell], expected[cell]) for cell in large]
    rest = draws - sum(count for count, _ in cells), draws - sum(e for _, e in cells)
    cells = [(count, e) for count, e in [*cells, rest] if e > 0.5]
    return sum((count - e) ** 2 / e for count, e in cells), len(cells)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("source", "temperature"), [("lookup", 1.0), ("near", 1.0), ("near", 0.6), ("far", 1.0)]
)
def test_samples_have_the_distribution_of_the_model(source, temperature):
    """Four tokens from a vocabulary of four: 256 possible sequences."""
    table = TABLE[:4, :4, :4]
    options = {**SOURCES[source](), "do_sample": True, "top_k": 0, "temperature": temperature}
    if helper := options.get("assistant_model"):
        scores = helper.scores
        options["assistant_model"] = TableModel(lambda ids: scores(ids)[:4])
    generator = np.random.default_rng(11)
    model, draws = order_two(table), 2000
    prompt = [1, 2, 3, 0, 1, 2]
    counts = Counter(
        tuple(model.generate([prompt], max_new_tokens=4, generator=generator, **options)[0, 6:].tolist())
        for _ in range(draws)
    )
    probabilities = {}
    for text in itertools.product(range(4), repeat=4):
        ids, p = list(prompt), 1.0
        for token in text:
            p *= softmax(table[ids[-2], ids[-1]] / temperature)[token]
            ids.append(token)
        probabilities[text] = p
    statistic, cells = chi_square(counts, probabilities, draws)
    degrees = cells - 1
    # Mean `degrees`, deviation sqrt(2 degrees): beyond four deviations for about one of 10,000 seeds.
    assert statistic < degrees + 4 * np.sqrt(2 * degrees), (statistic, degrees)


def test_the_chi_square_test_detects_a_wrong_distribution():
    """Tokens of the assistant without rejection sampling."""
    table, near = TABLE[:4, :4, :4], blurred(1, 0.5)
    draws, counts = 2000, Counter()
    generator = np.random.default_rng(11)
    for _ in range(draws):
        ids = [1, 2]
        for _ in range(4):
            ids.append(int(generator.choice(4, p=softmax(near.scores(ids)[:4]))))
        counts[tuple(ids[2:])] += 1
    probabilities = {}
    for text in itertools.product(range(4), repeat=4):
        ids, p = [1, 2], 1.0
        for token in text:
            p *= softmax(table[ids[-2], ids[-1]])[token]
            ids.append(token)
        probabilities[text] = p
    statistic, cells = chi_square(counts, probabilities, draws)
    assert statistic > cells - 1 + 4 * np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("source", ["lookup", "suffix", "ruled lookup"])
def test_drafts_without_a_model_sample_the_same_tokens_with_a_seed(source):
    options = {"max_new_tokens": 60, "do_sample": True, "seed": 3, "top_k": 3}
    plain = order_two(TABLE).generate([[1, 2]], **options)
    drafted = order_two(TABLE).generate([[1, 2]], **SOURCES[source](), **options)
    assert plain.tolist() == drafted.tolist()


def test_speculation_can_be_switched_off_where_the_models_file_has_it_on():
    model = counting()
    model.generation_config = GenerationConfig(prompt_lookup_num_tokens=4)
    model.generate([[1, 2, 3]], max_new_tokens=5)
    assert model.plan.rewinds
    model.generate([[1, 2, 3]], max_new_tokens=5, speculation="off")
    assert not model.plan.rewinds


def test_prompt_lookup_needs_fewer_forward_passes():
    loop_of_five = lambda ids: one_hot((ids[-1] + 1) % 5, 6)  # noqa: E731
    model = TableModel(loop_of_five)
    passes = []

    class Counted(type(model.decoder(None, {}))):
        def extend(self, ids):
            passes.append(ids.shape[1])
            return super().extend(ids)

    model.decoder = lambda plan, inputs: Counted(loop_of_five, plan, [])
    out = model.generate([[0, 1, 2, 3, 4, 0, 1]], max_new_tokens=33, prompt_lookup_num_tokens=7)
    assert out[0].tolist() == [i % 5 for i in range(40)]
    assert passes == [8, 8, 8, 8]  # 1 + 4 * 8 tokens; drafts end at max_new_tokens


def test_an_assistant_equal_to_the_model_has_all_drafts_accepted():
    helper = counting()
    out = counting().generate([[1]], max_new_tokens=12, assistant_model=helper, num_assistant_tokens=5)
    assert out[0].tolist() == list(range(1, 14))
    assert [entry[0] for entry in helper.log].count("prefill") == 1


def test_scores_and_logits_equal_decoding_without_drafts():
    wanted = {
        "max_new_tokens": 15,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
    }
    plain = order_two(TABLE).generate([[1, 2]], **wanted)
    drafted = order_two(TABLE).generate([[1, 2]], **wanted, **SOURCES["near"]())
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        np.testing.assert_array_equal(np.stack(getattr(drafted, name)), np.stack(getattr(plain, name)))


class Letters:
    def decode(self, ids):
        return "".join("abcdefg"[id] for id in ids)


@pytest.mark.parametrize("source", SOURCES)
def test_streamers_stop_strings_and_stopping_criteria(source):
    class Recorder:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(np.asarray(value).tolist())

        def end(self):
            self.got.append("end")

    plain = order_two(TABLE).generate([[0, 1]], max_new_tokens=20)[0].tolist()
    stop = Letters().decode(plain[6:9])
    calls, ours = [], Recorder()

    def criterion(ids, scores):
        calls.append(ids.shape)
        return False

    theirs = Recorder()
    options = {"max_new_tokens": 20, "stop_strings": stop, "tokenizer": Letters()}
    order_two(TABLE).generate([[0, 1]], streamer=theirs, **options)
    order_two(TABLE).generate(
        [[0, 1]], streamer=ours, stopping_criteria=[criterion], **options, **SOURCES[source]()
    )
    assert ours.got == theirs.got
    assert calls == [(1, n) for n in range(3, 3 + len(calls))]


def test_logits_processors_get_accepted_tokens_only():
    calls = []

    def spy(ids, scores):
        calls.append(ids[0].tolist())
        return scores

    out = order_two(TABLE).generate([[0, 1]], max_new_tokens=12, logits_processor=[spy], **SOURCES["far"]())
    assert calls == [out[0, :n].tolist() for n in range(2, 14)]


def test_prompt_lookup_takes_the_longest_then_latest_match_and_wraps_around():
    source = PromptLookup(6, 2)
    assert source.propose([5], 9).tokens == []
    assert source.propose([5, 1, 2, 9, 1, 3, 1], 9).tokens == [
        3,
        1,
        3,
        1,
        3,
        1,
    ]  # "3" follows "1"; then cyclic
    assert source.propose([5, 1, 2, 9, 1, 3, 1, 2], 3).tokens == [9, 1, 3]  # "1 2" is longer than "2"
    assert LONGEST_DRAFT == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"inputs": [[1], [2]], "prompt_lookup_num_tokens": 3},
            "needs one prompt and one sequence, got 2 rows",
        ),
        (
            {"inputs": [[1]], "prompt_lookup_num_tokens": 3, "num_return_sequences": 2, "do_sample": True},
            "needs one prompt and one sequence, got 2 rows",
        ),
        ({"inputs": [[1]], "prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens=0"),
        (
            {"inputs": [[1]], "speculation": "tree"},
            "speculation='tree': expected 'suffix', 'lookup' or 'off'",
        ),
        ({"inputs": [[1]], "speculation": True}, "speculation=True: expected"),
        ({"inputs": [[1]], "speculation": "suffix", "prompt_lookup_num_tokens": 3}, "pass one of them"),
        ({"inputs": [[1], [2]], "speculation": "suffix"}, "needs one prompt"),
        ({"inputs": [[1]], "speculation": "suffix", "num_beams": 2}, "cannot be combined"),
        ({"inputs": [[1]], "assistant_model": counting(50)}, "vocabulary of 100 tokens, and has 50"),
        (
            {"inputs": [[1]], "assistant_model": counting(), "prompt_lookup_num_tokens": 3},
            "pass one of them",
        ),
        (
            {"inputs": [[1]], "assistant_model": counting(), "num_assistant_tokens_schedule": "heuristic"},
            "heuristic_transient",
        ),
        (
            {"inputs_embeds": np.zeros((1, 2, 3)), "assistant_model": counting()},
            "pass input_ids instead of inputs_embeds",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        counting().generate(**arguments, max_new_tokens=4)


@pytest.mark.parametrize("field", ["assistant_ensemble_weight", "assistant_lookbehind", "speculation_type"])
def test_unsupported_fields_are_refused_by_name(field):
    with pytest.raises(UnsupportedConfig, match=field):
        counting().generate([[1]], **{field: 3})


def test_draft_options_of_the_call_take_precedence_over_those_of_the_assistant(caplog, monkeypatch):
    def drafts(**options):
        lengths, helper = [], counting()
        propose = Assistant.propose
        monkeypatch.setattr(
            Assistant, "propose", lambda *args: lengths.append(len((d := propose(*args)).tokens)) or d
        )
        helper.generation_config = GenerationConfig(num_assistant_tokens=1)
        counting().generate([[1]], max_new_tokens=13, assistant_model=helper, **options)
        monkeypatch.undo()
        return lengths

    assert drafts() == [1] * 6
    assert drafts(num_assistant_tokens=5) == [5, 5]
    growing = {"num_assistant_tokens": 1, "num_assistant_tokens_schedule": "heuristic_transient"}
    assert drafts(**growing) == [1, 3, 5]
    assert not caplog.messages
    counting().generate([[1]], max_new_tokens=2, num_assistant_tokens=6)
    assert "num_assistant_tokens=6 has no effect without assistant_model" in caplog.text
