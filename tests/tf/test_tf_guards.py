"""Invalid values in graphs raise with a message of one line: at tracing where they are known, else at run time; and
AutoGraph logs no warnings."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tf_pairs import shallow

from monoblock.backends.tf.arrays import TfOps
from monoblock.generation import scores

IDS = np.array([[5, 9, 11, 20], [7, 30, 31, 32]], np.int32)
DYNAMIC = tf.TensorSpec((None, None), tf.int32)
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


@pytest.fixture(scope="module", params=[True, False], ids=["static lengths", "dynamic lengths"])
def loops(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    """A compiled model, whose loops are traced once for all cases; and whether the lengths are static."""
    ours = shallow("MPNetForTokenClassification")
    ours.compile("sgd", jit_compile=False)
    return ours, request.param


@pytest.mark.parametrize("case", LOOPS)
def test_keras_loops(case: str, loops: tuple[Any, bool]) -> None:
    given, message = LOOPS[case]
    ours, static = loops
    data: Any = given
    if not static:
        spec = dict.fromkeys(given, DYNAMIC)
        data = tf.data.Dataset.from_generator(lambda: iter([given]), output_signature=spec)
    for loop in (ours.fit, ours.evaluate, *(() if case == "labels" else (ours.predict,))):
        with pytest.raises(ValueError, match=message) as caught:
            loop(data, verbose=0)
        text = str(caught.value)
        assert "\n" not in text or "while tracing" in text or "user code" in text


@pytest.mark.parametrize("name", ["MPNetModel", "GPTNeoModel", "OpenAIGPTModel"])
def test_more_tokens_than_positions_raise_at_tracing(name: str) -> None:
    """Positions that depend on ids or the mask have no values in a graph, so padding is counted too."""
    ours = shallow(name)

    @tf.function(autograph=False)
    def run(ids: Any) -> Any:
        return ours(input_ids=ids, attention_mask=tf.ones_like(ids)).last_hidden_state

    with pytest.raises(ValueError, match=r"has 6\d learned positions, but the input has 70 tokens"):
        run.get_concrete_function(tf.TensorSpec((1, 70), tf.int32))
    dynamic = tf.function(run.python_function, input_signature=[DYNAMIC], autograph=False)
    assert dynamic(tf.constant(IDS)).shape == (2, 4, 36)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"learned positions, but the input has\] \[70"):
        dynamic(tf.constant(LONG))


def test_tf_functions_around_models() -> None:
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


def test_autograph_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ours = shallow("GPTNeoForCausalLM")
    with caplog.at_level(logging.WARNING):
        for options in ({"jit_compile": True}, {}):
            run = tf.function(ours.generate, **options)
            assert run(tf.constant(IDS), max_new_tokens=2, do_sample=False).shape == (2, 6)
        assert tf.function(ours)(tf.constant(IDS)).logits.shape == (2, 4, 89)
    assert not [record for record in caplog.records if "AutoGraph" in record.getMessage()]


def test_labels_of_unknown_rank() -> None:
    """Labels without a static shape raise nothing at tracing."""
    ours = shallow("MptForCausalLM")
    run = tf.function(lambda labels: ours(IDS, labels=labels).loss, autograph=False)
    assert run.get_concrete_function(tf.TensorSpec(None, tf.int32))(tf.constant(IDS)).shape == (1,)


def test_powers_stay_finite() -> None:
    """In a compiled loop, where the exponent is a tensor."""
    found = tf.function(lambda n: scores.power(TfOps(), 1.9, n))(tf.constant(2000.0))
    assert float(found) == pytest.approx(1e30)
