"""TF models as Keras models: `compile`, `fit`, `evaluate` and `predict` in every input format, callbacks, policies,
`.keras` files, SavedModels, the functional API and distribution strategies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract.models import fields
from measure import assert_close
from tf_pairs import shallow
from tiny_families import ONE_LAYER

from monoblock.backends.tf.classes import make_class
from monoblock.families import family_of

ROWS, TOKENS, LABELS = 64, 8, 3
NO_DROPOUT = {"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0}


def toy(kind: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs, and labels that are functions of them: the class of a row is in its last id, that of a token in its id, a
    span begins at a certain id, and sequences are periodic."""
    generator = np.random.default_rng(4)
    ids = generator.integers(10, 80, (ROWS, TOKENS)).astype(np.int32)
    mask = np.ones_like(ids)
    if kind == "sequence":
        labels: dict[str, np.ndarray] = {"labels": generator.integers(0, LABELS, ROWS)}
        ids[:, -1] = 20 + labels["labels"]
    elif kind == "token":
        ids[:] = generator.integers(10, 10 + LABELS, ids.shape)
        labels = {"labels": ids - 10}
    elif kind == "span":
        starts = generator.integers(0, TOKENS - 1, ROWS)
        ids[np.arange(ROWS), starts], ids[np.arange(ROWS), starts + 1] = 7, 8
        labels = {"start_positions": starts, "end_positions": starts + 1}
    else:
        ids[:] = (generator.integers(0, 4, (ROWS, 1)) + np.arange(TOKENS)) % 4 + 10
        labels = {"labels": ids.astype(np.int64)}
    return {"input_ids": ids, "attention_mask": mask}, labels


def formatted(how: str, x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `fit` in one of the formats that it takes."""
    labels = next(iter(y.values())) if len(y) == 1 else y
    data = tf.data.Dataset.from_tensor_slices(({**x, **y},)).map(lambda row: row)
    batches = tf.data.Dataset.from_tensor_slices((x, labels)).batch(16, drop_remainder=True)
    formats: dict[str, Any] = {
        "labels in the dict": {"x": {**x, **y}, "batch_size": 16},
        "list and y": {"x": list(x.values()), "y": labels, "batch_size": 16},
        "ids and y": {"x": x["input_ids"], "y": labels, "batch_size": 16},
        "tf.data with labels inside": {"x": data.batch(16, drop_remainder=True)},
        "tf.data of pairs": {"x": batches},
        "generator": {"x": (b for _ in range(99) for b in batches.as_numpy_iterator()), "steps_per_epoch": 4},
    }
    return formats[how]


TASKS = {
    "sequence": "MistralForSequenceClassification",
    "token": "MPNetForTokenClassification",
    "span": "MPNetForQuestionAnswering",
    "causal": "GPTNeoForCausalLM",
}
# Every format and every mode (compiled, mixed precision) with one of the tasks.
RUNS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "labels in the dict": ("sequence", "labels in the dict", {"jit_compile": False}, None),
    "list and y": ("token", "list and y", {"jit_compile": False}, None),
    "tf.data with labels inside": ("span", "tf.data with labels inside", {"jit_compile": False}, None),
    "tf.data of pairs": ("causal", "tf.data of pairs", {"jit_compile": False}, None),
    "generator, compiled": ("sequence", "generator", {"jit_compile": True}, None),
    "ids and y, mixed": ("sequence", "ids and y", {"jit_compile": False}, "mixed_bfloat16"),
    "half precision, compiled": ("token", "labels in the dict", {"jit_compile": True}, "mixed_float16"),
}


@pytest.mark.parametrize("run", RUNS)
def test_fit_learns(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's loss falls, and accuracy exceeds 95%. The step is traced once."""
    kind, how, options, policy = RUNS[run]
    keras.utils.set_random_seed(0)
    ours = untrained(TASKS[kind], policy)
    x, y = toy(kind)
    ours.compile(keras.optimizers.Adam(1e-2), **options)
    step, traces = ours.train_step, []
    monkeypatch.setattr(ours, "train_step", lambda data: traces.append(data) or step(data))
    losses = ours.fit(**formatted(how, x, y), epochs=12, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < losses[0] / 2
    assert len(traces) == 1
    out = ours.predict(x, batch_size=32, verbose=0)
    for label, values in y.items():
        name = {"start_positions": "start_logits", "end_positions": "end_logits"}.get(label, "logits")
        best = np.asarray(out[name], np.float32).argmax(-1)
        right = best[:, 1:-1] == values[:, 2:] if kind == "causal" else best == values
        assert right.mean() > 0.95, label


def untrained(name: str, policy: str | None = None) -> Any:
    """A tiny model with the config's initialisation, and a range large enough to learn fast."""
    labels = {"num_labels": 2 if "Question" in name else LABELS, "initializer_range": 0.2}
    family = family_of(name)
    given = {**fields(name), **labels, **ONE_LAYER[family.name]}
    if family.name == "mpnet":
        given["hidden_dropout_prob"] = 0.0
    return make_class("TF" + name)(family.config(**given), dtype=policy)


def test_keras_losses_and_metrics() -> None:
    """`compile(optimizer, loss, metrics)` applies to the logits that y labels, in every form of y."""
    x, y = toy("sequence")
    ours = untrained("MistralForSequenceClassification")
    own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours.compile("adam", loss=own, metrics=["accuracy"], jit_compile=False)
    found = ours.evaluate(x, y["labels"], verbose=0, return_dict=True)
    inside = ours.evaluate({**x, **y}, verbose=0, return_dict=True)
    ours.compile("adam", metrics=["accuracy"], jit_compile=False)
    model_own = ours.evaluate({**x, **y}, verbose=0, return_dict=True)
    assert found == inside
    assert found["loss"] == pytest.approx(model_own["loss"], abs=1e-5)
    assert found["accuracy"] == model_own["accuracy"]
    span = untrained("MPNetForQuestionAnswering")
    x, y = toy("span")
    span.compile("adam", loss=dict.fromkeys(y, own), jit_compile=False)
    by_name = span.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    span.compile("adam", jit_compile=False)
    # The model's loss is the mean over start and end, Keras's is their sum.
    assert span.evaluate(x, y, verbose=0, return_dict=True)["loss"] == pytest.approx(by_name / 2, abs=1e-5)


def test_sample_weights_and_missing_labels() -> None:
    x, y = toy("sequence")
    ours = untrained("MistralForSequenceClassification")
    ours.compile("adam", run_eagerly=True)
    half = np.r_[np.ones(32), np.zeros(32)]
    weighted = ours.test_step((x, y["labels"], half))["loss"]
    first = {name: value[:32] for name, value in x.items()}
    ours.reset_metrics()
    alone = ours.test_step((first, y["labels"][:32]))["loss"]
    assert float(weighted) == pytest.approx(float(alone) / 2, abs=1e-5)
    with pytest.raises(ValueError, match="there are no labels"):
        ours.train_step((x,))
    with pytest.raises(ValueError, match="loss takes the labels labels, got targets"):
        ours.train_step((x, {"targets": y["labels"]}))
    causal = shallow("GPTNeoForCausalLM")
    causal.compile("adam", run_eagerly=True)
    x, y = toy("causal")
    with pytest.raises(ValueError, match="sample_weight is per row"):
        causal.train_step((x, y["labels"], half))


def test_training_continues_from_a_keras_file(tmp_path: Path) -> None:
    """ModelCheckpoint's `.keras` file holds weights, optimizer, compilation and dropout seeds."""
    x, y = toy("token")
    ours = untrained("MPNetForTokenClassification")
    ours.compile("adam", jit_compile=False)
    saves = [
        keras.callbacks.ModelCheckpoint(tmp_path / "whole.keras"),
        keras.callbacks.ModelCheckpoint(tmp_path / "only.weights.h5", save_weights_only=True),
    ]
    ours.fit({**x, **y}, batch_size=16, verbose=0, shuffle=False, callbacks=saves)
    other = keras.saving.load_model(tmp_path / "whole.keras")
    assert type(other) is type(ours)
    assert other.config.to_dict() == ours.config.to_dict()
    for each in (ours, other):
        each.fit({**x, **y}, batch_size=16, verbose=0, shuffle=False)
    for a, b in zip(ours.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = untrained("MPNetForTokenClassification")
    fresh.load_weights(tmp_path / "only.weights.h5")
    assert not np.array_equal(fresh.weights[0], ours.weights[0])


def test_functional_models(tmp_path: Path) -> None:
    """A model as a layer of another: outputs by name and by index, and saved with it."""
    body = shallow("MistralModel")
    ids, mask = (keras.Input((None,), dtype="int32", name=name) for name in ("ids", "mask"))
    out = body({"input_ids": ids, "attention_mask": mask}, use_cache=False)
    pooled = keras.layers.GlobalAveragePooling1D()(out.last_hidden_state)
    whole = keras.Model([ids, mask], keras.layers.Dense(3)(pooled))
    whole.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    x, y = toy("sequence")
    whole.fit([x["input_ids"], x["attention_mask"]], y["labels"], verbose=0)
    given = [x["input_ids"][:4], x["attention_mask"][:4]]
    whole.save(tmp_path / "whole.keras")
    again = keras.saving.load_model(tmp_path / "whole.keras")
    assert_close("functional, saved", again(given), whole(given), 0.0)
    single = keras.Model(ids, body(ids, use_cache=False)[0])
    assert_close("functional", single(given[0]), body(given[0], use_cache=False).last_hidden_state, 1e-6)


SERVED = """
import sys, numpy as np, tensorflow as tf
found = np.load(sys.argv[1] + "/io.npz")
signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
out = signature(input_ids=tf.constant(found["ids"]), attention_mask=tf.constant(found["mask"]))
assert not [name for name in sys.modules if name.startswith("monoblock")]
print("difference:", float(np.abs(out["logits"] - found["logits"]).max()) < 1e-5)
"""


def test_exported_models_run_without_monoblock(tmp_path: Path) -> None:
    ours = shallow("GPTNeoForCausalLM")
    ours.save_pretrained(tmp_path, saved_model=True)
    x, _ = toy("causal")
    ids, mask = x["input_ids"][:3], x["attention_mask"][:3].copy()
    mask[0, :3] = 0
    folder = tmp_path / "saved_model" / "1"
    logits = ours(input_ids=ids, attention_mask=mask).logits
    np.savez(folder / "io.npz", ids=ids, mask=mask, logits=logits)
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(folder)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "difference: True" in done.stdout, done.stderr[-2000:]


def test_exported_signatures(tmp_path: Path) -> None:
    ours = shallow("MPNetForMultipleChoice")
    signature = {"input_ids": tf.TensorSpec((1, 2, 5), tf.int32, name="input_ids")}
    ours.export(tmp_path, input_signature=signature, verbose=False)
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    ids = np.full((1, 2, 5), 11, np.int32)
    assert_close("served", served(input_ids=tf.constant(ids))["logits"], ours(ids).logits, 1e-5)
    with pytest.raises(ValueError, match="must be a dict of tf"):
        ours.export(tmp_path, input_signature=tf.TensorSpec((1, 2)))


def test_strategies() -> None:
    """Two replicas with half a batch each take the same step as one with the whole batch."""
    x, y = toy("causal")
    results = []
    for strategy in strategies():
        with strategy.scope():
            ours = shallow("GPTNeoForCausalLM", **NO_DROPOUT)
            ours.compile(keras.optimizers.SGD(0.1), jit_compile=False)
        ours.fit({**x, **y}, batch_size=32, verbose=0, shuffle=False)
        results.append(ours.variable("transformer.h.0.attn.attention.k_proj.weight").numpy())
    assert_close("strategies", *results, 1e-5)


def strategies() -> list[Any]:
    devices = [f"/cpu:{i}" for i in range(len(tf.config.list_logical_devices("CPU")))]
    assert len(devices) == 2
    # Without collectives, for which TensorFlow assumes equal shapes for all models of a process.
    ops = tf.distribute.ReductionToOneDevice()
    return [tf.distribute.MirroredStrategy(devices, cross_device_ops=ops), tf.distribute.get_strategy()]


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in another model"])
def test_losses_of_keras_under_strategies(inside: bool) -> None:
    """A Keras loss and metrics, whose state Keras builds from the mean of the replicas' batches; then `predict`."""
    x, y = toy("sequence")
    results = []
    for strategy in strategies():
        with strategy.scope():
            body: Any = shallow("MistralForSequenceClassification", **NO_DROPOUT, num_labels=LABELS)
            ours = Wrapped(body) if inside else body
            own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            ours.compile(keras.optimizers.SGD(0.1), loss=own, metrics=["accuracy"], jit_compile=False)
        history = ours.fit(x, y["labels"], batch_size=32, verbose=0, shuffle=False).history
        predicted = ours.predict(x, batch_size=24, verbose=0)  # the last batch is smaller
        results.append([predicted if inside else predicted.logits, history["accuracy"], history["loss"]])
    assert results[0][0].shape == (ROWS, LABELS)
    for name, one, two in zip(("logits", "accuracy", "loss"), *results, strict=True):
        assert_close(f"strategies: {name}", one, two, 1e-5)


class Wrapped(keras.Model):
    """A Keras model around one of ours."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def call(self, x: Any, training: bool = False) -> Any:
        return self.body(x, training=training).logits


def test_predictions_under_strategies() -> None:
    """Outputs, tuples included, have the structure that one replica returns."""
    x, _ = toy("span")
    strategy = strategies()[0]
    with strategy.scope():
        ours = shallow("MPNetForQuestionAnswering", output_hidden_states=True, output_attentions=True)
    ours.compile(jit_compile=False)
    found = ours.predict(x, batch_size=32, verbose=0)
    expected = ours(x)
    assert type(found) is type(expected)
    tf.nest.assert_same_structure(found, expected)
    for one, two in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        assert_close("predictions", one, two, 1e-5)


def test_summary() -> None:
    lines: list[str] = []
    ours = shallow("MistralForCausalLM")
    ours.summary(print_fn=lambda text, **_: lines.append(text))
    assert f"{ours.num_parameters():,}" in "\n".join(lines)
    assert ours.count_params() == ours.num_parameters()
