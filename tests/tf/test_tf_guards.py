"""What is wrong with values that a graph gets is said in one sentence: while tracing where it can be seen, else when it
runs; and AutoGraph has nothing to say."""

from __future__ import annotations

import functools
import logging
from typing import Any

import invalid_inputs
import numpy as np
import pytest
import tensorflow as tf
from tf_pairs import shallow

from monoblock.backends.tf.arrays import TfOps
from monoblock.generation import scores

IDS = np.array([[5, 9, 11, 20], [7, 30, 31, 32]], np.int32)
OPEN = tf.TensorSpec((None, None), tf.int32)
LONG = np.full((1, 70), 7, np.int32)

LOOPS: dict[str, tuple[dict[str, Any], str]] = {
    "ids": (
        {"input_ids": IDS + 80, "labels": IDS % 3},
        r"input_ids must be 0 to 88 \(is this the tokenizer of this model\?\), but go from 85 to 112",
    ),
    "negative": ({"input_ids": IDS - 6, "labels": IDS % 3}, r"input_ids must be .* but go from -1 to 26"),
    "labels": (
        {"input_ids": IDS, "labels": np.where(IDS == 9, -100, IDS)},
        r"labels must be 0 to 3 \(-100 stands for none\), but go from 0 to 32",
    ),
    "length": (
        {"input_ids": LONG, "labels": LONG % 3},
        "has 64 learned positions, but the input has 70 tokens",
    ),
}


@pytest.fixture(scope="module", params=[True, False], ids=["known lengths", "open lengths"])
def loops(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    """A compiled model, whose loops are traced once for all cases; and whether it is to know the lengths."""
    ours = shallow("MPNetForTokenClassification")
    ours.compile("sgd", jit_compile=False)
    return ours, request.param


@pytest.mark.parametrize("case", LOOPS)
def test_loops_of_keras(case: str, loops: tuple[Any, bool]) -> None:
    given, message = LOOPS[case]
    ours, known = loops
    data: Any = given
    if not known:
        spec = dict.fromkeys(given, OPEN)
        data = tf.data.Dataset.from_generator(lambda: iter([given]), output_signature=spec)
    for loop in (ours.fit, ours.evaluate, *(() if case == "labels" else (ours.predict,))):
        with pytest.raises(ValueError, match=message) as caught:
            loop(data, verbose=0)
        text = str(caught.value)
        assert "\n" not in text or "while tracing" in text or "user code" in text


@pytest.mark.parametrize("name", ["MPNetModel", "GPTNeoModel", "OpenAIGPTModel"])
def test_too_long_while_tracing(name: str) -> None:
    """Positions from ids, and from the mask, have no values in a graph: padding counts there."""
    ours = shallow(name)

    @tf.function(autograph=False)
    def run(ids: Any) -> Any:
        return ours(input_ids=ids, attention_mask=tf.ones_like(ids)).last_hidden_state

    with pytest.raises(ValueError, match=r"has 6\d learned positions, but the input has 70 tokens"):
        run.get_concrete_function(tf.TensorSpec((1, 70), tf.int32))
    open_ = tf.function(run.python_function, input_signature=[OPEN], autograph=False)
    assert open_(tf.constant(IDS)).shape == (2, 4, 36)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"learned positions, but the input has\] \[70"):
        open_(tf.constant(LONG))


def test_graphs_of_the_users() -> None:
    ours = shallow("GPTNeoForCausalLM")
    run = tf.function(ours, autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="input_ids must be 0 to 88"):
        run(tf.constant(IDS + 80))
    with pytest.raises(tf.errors.InvalidArgumentError, match="position_ids must be 0 to 63"):
        run(input_ids=tf.constant(IDS), position_ids=tf.constant(IDS * 3))
    with pytest.raises(
        ValueError, match=r"^labels must be 0 to 88 \(-100 stands for none\), but go from 99 to 99$"
    ):
        ours(IDS, labels=np.full_like(IDS, 99))


def test_autograph_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ours = shallow("GPTNeoForCausalLM")
    with caplog.at_level(logging.WARNING):
        for options in ({"jit_compile": True}, {}):
            run = tf.function(ours.generate, **options)
            assert run(tf.constant(IDS), max_new_tokens=2, do_sample=False).shape == (2, 6)
        assert tf.function(ours)(tf.constant(IDS)).logits.shape == (2, 4, 89)
    assert not [record for record in caplog.records if "AutoGraph" in record.getMessage()]


@functools.cache
def made(name: str) -> Any:
    return shallow(name, num_labels=4)


@pytest.mark.parametrize("case", invalid_inputs.INVALID)
def test_wrong_values_get_one_clear_sentence(case: str) -> None:
    name, given = invalid_inputs.arguments(case)
    with pytest.raises(ValueError, match=invalid_inputs.INVALID[case][2]) as caught:
        made(name)(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", invalid_inputs.VALID)
def test_whole_numbers_of_any_size_are_ids(case: str) -> None:
    given, ours = invalid_inputs.VALID[case], made("GPTNeoForCausalLM")
    expected = ours(**{name: x.astype(np.int32) for name, x in given.items()}).logits
    assert np.array_equal(ours(**given).logits, expected)


def test_labels_of_an_unknown_number_of_axes() -> None:
    """A graph that knows no shape of its labels says nothing while tracing."""
    ours = made("MptForCausalLM")
    run = tf.function(lambda labels: ours(IDS, labels=labels).loss, autograph=False)
    assert run.get_concrete_function(tf.TensorSpec(None, tf.int32))(tf.constant(IDS)).shape == (1,)


@pytest.mark.parametrize("case", invalid_inputs.REFUSED)
def test_generate_refuses_at_the_door(case: str) -> None:
    with pytest.raises(ValueError, match=invalid_inputs.REFUSED[case][1]) as caught:
        made("GPTNeoForCausalLM").generate(**invalid_inputs.refused(case))
    assert "\n" not in str(caught.value)


def test_seeds_of_64_bits() -> None:
    ours = made("GPTNeoForCausalLM")
    for seed in invalid_inputs.EXTREME_SEEDS:
        given = {"max_new_tokens": 3, "do_sample": True, "seed": seed, "disable_compile": True}
        one, two = (np.asarray(ours.generate(IDS, **given)) for _ in range(2))
        assert np.array_equal(one, two)


def test_powers_stay_finite() -> None:
    """In a compiled loop, where the exponent is the device's."""
    found = tf.function(lambda n: scores.power(TfOps(), 1.9, n))(tf.constant(2000.0))
    assert float(found) == pytest.approx(1e30)
