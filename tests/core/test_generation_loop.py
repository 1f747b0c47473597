"""The generation loop with a fake decoder: its calls, stopping, outputs, seeds and streamers."""

import time

import numpy as np
import pytest
from fakes import TableModel, constant, counting, one_hot

from monoblock.errors import UnsupportedConfig
from monoblock.generation import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from monoblock.generation.loop import GenerateDecoderOnlyOutput


def rows(result):
    return result.tolist()


def test_greedy_search_prefills_once_and_feeds_back_all_tokens_but_the_last():
    model = counting()
    assert rows(model.generate([[7, 8]], max_new_tokens=3)) == [[7, 8, 9, 10, 11]]
    assert model.log == [("prefill", [[7, 8]], None), ("step", [9]), ("step", [10])]
    assert (model.plan.prompt_length, model.plan.max_length, model.plan.rows) == (2, 5, 1)


@pytest.mark.parametrize("eos", [12, [12], [12, 99], (50, 12)])
def test_any_eos_token_finishes_a_row_which_is_padded(eos):
    out = counting().generate([[7], [10], [1]], max_new_tokens=6, eos_token_id=eos, pad_token_id=0)
    assert rows(out) == [[7, 8, 9, 10, 11, 12, 0], [10, 11, 12, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]]


def test_generation_stops_when_all_rows_are_finished_and_pads_with_eos_by_default():
    model = counting()
    assert rows(model.generate([[8], [10]], max_new_tokens=1000, eos_token_id=12)) == [
        [8, 9, 10, 11, 12],
        [10, 11, 12, 12, 12],
    ]
    # Four tokens: the prefill and three steps; nothing is computed after the last row's eos.
    assert [entry[0] for entry in model.log] == ["prefill", "step", "step", "step"]
    assert model.log[-1] == ("step", [11, 12])


def test_eos_in_the_prompt_does_not_stop():
    assert rows(counting().generate([[12, 3]], max_new_tokens=2, eos_token_id=12)) == [[12, 3, 4, 5]]


def test_negative_eos_of_old_files_means_none():
    assert rows(counting().generate([[1]], max_new_tokens=2, eos_token_id=-1)) == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ({"max_length": 5}, 3),
        ({"max_new_tokens": 4}, 4),
        ({"max_new_tokens": 4, "max_length": 3}, 4),  # as in transformers, max_new_tokens takes precedence
        ({}, 20),  # transformers' default
    ],
)
def test_length_limits(lengths, new):
    assert counting().generate([[1, 2]], **lengths).shape == (1, 2 + new)


def test_the_default_length_is_limited_by_the_position_table():
    model = counting()
    model.max_positions = 10
    assert model.generate([[1, 2]]).shape == (1, 10)


def test_a_prompt_of_max_length_is_refused():
    with pytest.raises(ValueError, match=r"prompt has 3 tokens and max_length=3 .*max_new_tokens"):
        counting().generate([[1, 2, 3]], max_length=3)


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 4}, {"min_length": 6}])
def test_minimum_lengths_suppress_eos(minimum):
    model = constant([0.0, 5.0, 1.0])  # eos first, then 2
    out = model.generate([[0, 0]], max_new_tokens=8, eos_token_id=1, **minimum)
    assert rows(out) == [[0, 0, 2, 2, 2, 2, 1]]


def test_left_padded_rows_equal_single_rows():
    table = np.random.default_rng(0).normal(size=(30, 30))
    scores = lambda ids: table[sum(ids) % 30]  # noqa: E731
    prompts = [[4, 9, 11, 5], [7], [8, 2]]
    ids = [[29] * (4 - len(p)) + p for p in prompts]
    mask = [[0] * (4 - len(p)) + [1] * len(p) for p in prompts]
    options = {
        "max_new_tokens": 9,
        "eos_token_id": [3, 17],
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
    }
    together = rows(TableModel(scores).generate(ids, attention_mask=mask, pad_token_id=29, **options))
    inferred = rows(TableModel(scores).generate(ids, pad_token_id=29, **options))
    assert together == inferred  # leading pad tokens that are no eos are padding
    for padded, prompt in zip(together, prompts, strict=True):
        alone = rows(TableModel(scores).generate([prompt], pad_token_id=29, **options))[0]
        assert padded[4 - len(prompt) :][: len(alone)] == alone
        assert set(padded[4 - len(prompt) :][len(alone) :]) <= {29}


def test_a_mask_of_ones_is_dropped():
    model = counting()
    model.generate([[1, 2]], attention_mask=[[1, 1]], max_new_tokens=1)
    assert model.log == [("prefill", [[1, 2]], None)]


def test_a_pad_token_that_is_also_eos_is_no_padding(caplog):
    model = counting()
    model.generate([[5, 1]], max_new_tokens=1, pad_token_id=5, eos_token_id=5)
    assert model.log[0][2] is None
    model.generate([[5, 1], [1, 2]], max_new_tokens=1, pad_token_id=5, eos_token_id=5)
    assert model.log[1][2] is None
    assert "pass attention_mask" in caplog.text


def test_right_padding_is_logged(caplog):
    counting().generate([[1, 0], [1, 2]], attention_mask=[[1, 0], [1, 1]], max_new_tokens=1, pad_token_id=0)
    assert "pad on the left" in caplog.text


# ---------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([[]], {}, "prompt is empty: pass at least one token"),
        ([], {}, r"shape \(rows, tokens\)"),
        ([1, 2], {}, r"shape \(rows, tokens\), got \(2,\)"),
        ([[1, 2], [3]], {}, "rows of equal length"),
        ([[0.5]], {}, "must be integers"),
        (None, {}, "has no prompt: pass input_ids, or set bos_token_id"),
        ([[1]], {"input_ids": [[1]]}, "both inputs and input_ids"),
        ([[1, 2]], {"attention_mask": [[1]]}, r"prompt's shape \(1, 2\).*got \(1, 1\)"),
        ([[1, 2]], {"attention_mask": [1, 1]}, r"prompt's shape"),
        ([[1], [2]], {"attention_mask": [[1], [0]]}, "row 1 of the prompt is all padding"),
        ([[1]], {"max_new_token": 3}, "unknown argument 'max_new_token': did you mean 'max_new_tokens'?"),
        ([[1]], {"zzzzzz": 3}, "unknown argument 'zzzzzz': it is neither a field"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: expected an integer of at least 1"),
        ([[1]], {"temperature": 0, "do_sample": True}, "temperature=0: .*do_sample=False"),
        ([[1]], {"temperature": float("nan"), "do_sample": True}, "temperature=nan"),
        (
            [[1]],
            {"top_p": 1.5, "do_sample": True},
            "top_p=1.5: expected a number of at least 0 and at most 1",
        ),
        ([[1]], {"top_k": -1, "do_sample": True}, "top_k=-1: .*0 keeps all"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty=0"),
        ([[1]], {"bad_words_ids": [[]]}, "bad_words_ids"),
        ([[1]], {"bad_words_ids": [[1000]]}, "token 1000, but the vocabulary ends at 99"),
        ([[1]], {"num_return_sequences": 2}, "without sampling would give equal sequences"),
        ([[1]], {"stop_strings": "x"}, "tokenizer=tokenizer"),
        ([[1]], {"stop_strings": [""]}, "none of them empty"),
        ([[1]], {"seed": 1, "generator": object(), "do_sample": True}, "both seed and generator"),
        ([[1]], {"seed": 1.5, "do_sample": True}, "integer"),
        ([[1]], {"forced_eos_token_id": 3, "suppress_tokens": [3]}, "every token of it is also in suppress"),
        ([[1]], {"prefix_allowed_tokens_fn": lambda row, ids: []}, "at least one id from 0 to 99"),
    ],
    ids=str,
)
def test_invalid_arguments(prompt, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        counting().generate(prompt, **arguments)
    assert "\n" not in str(error.value)


def test_a_string_prompt_is_refused():
    with pytest.raises(TypeError, match="tokenizer"):
        counting().generate("hello")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beam_groups", 2),
        ("diversity_penalty", 0.5),
        ("assistant_tokenizer", object()),
        ("constraints", [1]),
        ("dola_layers", "high"),
        ("assistant_early_exit", 2),
        ("target_lookbehind", 5),
        ("cache_implementation", "offloaded"),
        ("custom_generate", "someone/code"),
        ("watermarking_config", {}),
        ("penalty_alpha", 0.6),
    ],
)
def test_unsupported_arguments_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedConfig, match=f"{name}="):
        counting().generate([[1]], max_new_tokens=1, **{name: value})


def test_default_values_of_unsupported_arguments_are_accepted():
    defaults = {"num_beams": 1, "assistant_model": None, "synced_gpus": False, "penalty_alpha": 0.0}
    assert counting().generate([[1]], max_new_tokens=1, **defaults).shape == (1, 2)


def test_generation_without_prompt_starts_from_bos():
    assert rows(counting().generate(bos_token_id=41, max_new_tokens=2)) == [[41, 42, 43]]


def test_inputs_embeds_return_the_new_tokens_only():
    model = TableModel(lambda ids: one_hot(len(ids), 10))
    embeds = np.zeros((2, 5, 3))
    assert rows(model.generate(inputs_embeds=embeds, max_length=8)) == [[0, 1, 2]] * 2
    assert model.inputs["inputs_embeds"] is embeds
    assert (model.plan.prompt_length, model.plan.max_length) == (5, 8)


# ---------------------------------------------------------------------- criteria


def test_stopping_criteria_return_one_bool_or_one_per_row():
    calls = []

    class Each(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append((input_ids.shape, scores))
            return input_ids[:, -1] >= 12

    out = counting().generate([[8], [10]], max_new_tokens=9, stopping_criteria=[Each()], pad_token_id=0)
    assert rows(out) == [[8, 9, 10, 11, 12], [10, 11, 12, 0, 0]]
    assert calls[0] == ((2, 2), None)
    out = counting().generate(
        [[8], [10]],
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids.shape[1] == 4]),
        pad_token_id=0,
    )
    assert out.shape == (2, 4)


def test_stopping_criteria_get_all_scores_with_output_scores():
    steps = []
    counting().generate(
        [[8]],
        max_new_tokens=3,
        stopping_criteria=[lambda ids, scores: steps.append([s.shape for s in scores])],
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert steps == [[(1, 100)], [(1, 100)] * 2, [(1, 100)] * 3]


def test_invalid_stopping_criteria_are_refused():
    with pytest.raises(ValueError, match="returned 2 values; expected one bool, or 1"):
        counting().generate([[8]], max_new_tokens=3, stopping_criteria=[lambda ids, scores: [True, False]])
    with pytest.raises(TypeError, match="expected callables"):
        counting().generate([[8]], max_new_tokens=3, stopping_criteria=[3])


def test_rows_of_different_lengths_need_a_pad_token():
    with pytest.raises(ValueError, match="set pad_token_id"):
        counting().generate([[8], [9]], stopping_criteria=[lambda ids, scores: ids[:, -1] > 9])


def test_max_time_stops_all_rows_after_the_current_token():
    def slow(ids):
        time.sleep(0.02)
        return one_hot(1, 5)

    out = TableModel(slow).generate([[1]], max_new_tokens=10_000, max_time=0.1)
    # The time includes the prefill: 0.1 s are five steps of 0.02 s, or fewer on a loaded machine.
    assert 2 <= out.shape[1] <= 8


# ---------------------------------------------------------------------- processors in the loop


def test_logits_processors_run_before_sampling_and_are_validated():
    calls = []

    def only_seven(input_ids, scores):
        calls.append(input_ids.tolist())
        out = np.full_like(scores, -np.inf)
        out[:, 7] = 0
        return out

    out = counting().generate([[1]], max_new_tokens=2, do_sample=True, seed=0, logits_processor=[only_seven])
    assert rows(out) == [[1, 7, 7]]
    assert calls == [[[1]], [[1, 7]]]
    with pytest.raises(ValueError, match=r"must return scores of shape \(1, 100\), got nothing"):
        counting().generate([[1]], max_new_tokens=2, logits_processor=[lambda ids, scores: None])
    with pytest.raises(TypeError, match="expected callables"):
        counting().generate([[1]], max_new_tokens=2, logits_processor=["x"])


def test_suppressing_all_tokens_is_an_error():
    everything = list(range(100))
    with pytest.raises(ValueError, match="no token can be drawn"):
        counting().generate([[1]], max_new_tokens=1, do_sample=True, suppress_tokens=everything)


def test_prefix_allowed_tokens_fn_gets_the_index_of_the_prompt():
    out = constant(np.arange(10.0)).generate(
        [[1], [2]], max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, ids: [[3, 4], [5]][row]
    )
    assert rows(out) == [[1, 4, 4], [2, 5, 5]]


# ---------------------------------------------------------------------- outputs


def test_return_dict_and_num_return_sequences():
    model = constant(np.zeros(50))
    out = model.generate(
        [[1, 2], [3, 4]],
        max_new_tokens=3,
        do_sample=True,
        top_k=0,
        seed=3,
        num_return_sequences=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out.sequences.shape == (8, 5)
    assert out.sequences[:4, :2].tolist() == [[1, 2]] * 4
    assert len({tuple(row) for row in out.sequences[:4].tolist()}) > 1  # copies are sampled independently
    # The prompts are computed once, then copied.
    assert model.log[0] == ("prefill", [[1, 2], [3, 4]], None)
    assert model.log[1] == ("reorder", [0, 0, 0, 0, 1, 1, 1, 1])
    assert [s.shape for s in out.scores] == [(8, 50)] * 3
    assert out["logits"][0].dtype == np.float32
    assert [step[0].shape for step in out.hidden_states] == [(8, 1)] * 3
    assert out.attentions is None
    assert "attentions" not in out


def test_scores_are_after_and_logits_before_the_processors():
    out = constant([0.0, 3.0, 1.0]).generate(
        [[0]],
        max_new_tokens=1,
        suppress_tokens=[1],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert out.sequences.tolist() == [[0, 2]]
    np.testing.assert_array_equal(out.logits[0], [[0.0, 3.0, 1.0]])
    np.testing.assert_array_equal(out.scores[0], [[0.0, -np.inf, 1.0]])


# ---------------------------------------------------------------------- seeds


def test_a_seed_is_reproducible_and_leaves_the_global_generator_unchanged():
    model = constant(np.zeros(1000))
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    options = {"max_new_tokens": 10, "do_sample": True, "top_k": 0}
    first, again, other = (rows(model.generate([[1]], seed=seed, **options)) for seed in (7, 7, 8))
    assert first == again != other
    assert np.random.get_state()[1].tolist() == before
    generator = np.random.default_rng(7)
    assert rows(model.generate([[1]], generator=generator, **options)) == first
    assert rows(model.generate([[1]], generator=generator, **options)) != first


# ---------------------------------------------------------------------- streamers


class Recorder:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(np.asarray(value).tolist())

    def end(self):
        self.got.append("end")


def test_a_streamer_gets_the_prompt_each_token_and_the_end():
    recorder = Recorder()
    counting().generate([[1, 2]], max_new_tokens=3, eos_token_id=4, streamer=recorder)
    assert recorder.got == [[[1, 2]], [3], [4], "end"]


def test_a_streamer_needs_a_single_sequence():
    recorder = Recorder()
    with pytest.raises(ValueError, match="one sequence at a time, got 2 rows"):
        counting().generate([[1], [2]], streamer=recorder)
    assert recorder.got == ["end"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_streamer_is_ended_when_generation_fails(error):
    recorder = Recorder()

    def failing(ids):
        if len(ids) == 3:
            raise error
        return one_hot(5, 10)

    with pytest.raises(error):
        TableModel(failing).generate([[1]], max_new_tokens=9, streamer=recorder)
    assert recorder.got == [[[1]], [5], [5], "end"]


def test_a_streamer_is_ended_when_arguments_are_invalid():
    recorder = Recorder()
    with pytest.raises(ValueError, match="unknown argument"):
        counting().generate([[1]], streamer=recorder, nonsense=1)
    assert recorder.got == ["end"]


# ---------------------------------------------------------------------- the model's generation config


def test_the_call_takes_precedence_over_the_model():
    model = counting()
    model.generation_config = GenerationConfig.from_dict(
        {"max_new_tokens": 5, "eos_token_id": 99, "use_cache": False}
    )
    assert model.generate([[1]]).shape == (1, 6)
    assert model.plan.config.use_cache is True  # use_cache of files is ignored
    assert model.generate([[1]], max_new_tokens=2, use_cache=False).shape == (1, 3)
    assert model.plan.config.use_cache is False
    assert model.generate([[1]], GenerationConfig(max_new_tokens=3)).shape == (1, 4)
    assert model.generate([[1]], GenerationConfig(max_new_tokens=3), max_new_tokens=4).shape == (1, 5)
    assert model.generation_config.max_new_tokens == 5
