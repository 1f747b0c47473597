"""SavedModels of models and of Keras models around them, custom signatures; `from_tf` and `KerasMetricCallback` as in
transformers 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import v4_checkpoints
from measure import assert_close
from tf_pairs import shallow

import monoblock

IDS = np.array([[5, 9, 11, 20], [7, 30, 31, 32]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int32)


class Wrapped(keras.Model):
    """A classifier around the bare model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = shallow("MPNetModel")
        self.score = keras.layers.Dense(3)

    def call(self, ids: Any, training: bool = False) -> Any:
        return self.score(self.body(ids, training=training).pooler_output)


@pytest.mark.parametrize("how", ["saved_model", "export"])
def test_keras_models_around_ours(how: str, tmp_path: Path) -> None:
    """Keras traces their calls with float32 ids, as it knows no other dtype for them."""
    whole = Wrapped()
    expected = whole(IDS)
    if how == "export":
        whole.export(str(tmp_path), verbose=False)
    else:
        tf.saved_model.save(whole, str(tmp_path))
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    (spec,) = served.structured_input_signature[1].values()
    assert spec.dtype == tf.float32
    (found,) = served(tf.constant(IDS, tf.float32)).values()
    assert_close(how, found, expected, 1e-5)


def test_float_ids() -> None:
    """Keras inputs are float32 by default: ids may be float32 if they are integers, other inputs may not."""
    body = shallow("MPNetModel")
    ids = keras.Input((None,))
    whole = keras.Model(ids, body(ids)[1])
    assert_close("float input", whole(IDS), body(IDS)[1], 1e-6)
    assert_close("float values", body(IDS.astype(np.float32))[1], body(IDS)[1], 0.0)
    for wrong in (IDS + 0.5, tf.cast(IDS, tf.bfloat16)):
        with pytest.raises(ValueError, match="input_ids must be integers"):
            body(wrong)


def test_tf_saved_model_save(tmp_path: Path) -> None:
    """`tf.saved_model.save(model)` has the signature that `export` writes."""
    ours = shallow("GPTNeoForCausalLM")
    tf.saved_model.save(ours, str(tmp_path))
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    found = served(input_ids=tf.constant(IDS), attention_mask=tf.constant(MASK))
    assert list(found) == ["logits"]
    assert_close("saved", found["logits"], ours(input_ids=IDS, attention_mask=MASK).logits, 1e-5)


def test_signatures(tmp_path: Path) -> None:
    """`save_pretrained(saved_model=True)` has a signature for int32 and one for int64 ids, or the given ones."""
    ours = shallow("MPNetForTokenClassification")
    expected = ours(IDS, MASK).logits
    ours.save_pretrained(tmp_path, saved_model=True)
    saved = tf.saved_model.load(str(tmp_path / "saved_model" / "1"))
    for name, kind in {"serving_default": tf.int32, "int64_serving": tf.int64}.items():
        given = {"input_ids": tf.constant(IDS, kind), "attention_mask": tf.constant(MASK, kind)}
        assert_close(name, saved.signatures[name](**given)["logits"], expected, 1e-5)

    @tf.function(input_signature=[{"input_ids": tf.TensorSpec((None, None), tf.int32, name="input_ids")}])
    def best(inputs: Any) -> Any:
        return {"label": tf.argmax(ours(inputs).logits, axis=-1)}

    ours.save_pretrained(tmp_path, saved_model=True, version=2, signatures={"best": best})
    saved = tf.saved_model.load(str(tmp_path / "saved_model" / "2"))
    assert list(saved.signatures) == ["best"]
    found = saved.signatures["best"](input_ids=tf.constant(IDS))["label"]
    np.testing.assert_array_equal(found, np.argmax(ours(IDS).logits, -1))
    with pytest.raises(ValueError, match="need saved_model=True"):
        ours.save_pretrained(tmp_path, signatures={"best": best})
    assert set(ours.input_signature) == {"input_ids", "attention_mask"}
    assert_close(
        "serving", ours.serving({"input_ids": IDS, "attention_mask": MASK})["logits"], expected, 1e-5
    )


def test_from_tf(tmp_path: Path) -> None:
    """Which of two file formats is read."""
    folder = v4_checkpoints.FOLDER / "TFMPNetForMaskedLM"
    for name in ("config.json", "tf_model.h5"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    old = monoblock.TFMPNetForMaskedLM.from_pretrained(tmp_path)
    other = monoblock.TFMPNetForMaskedLM(old.config)
    other.save_pretrained(tmp_path)
    for cls in (monoblock.TFMPNetForMaskedLM, monoblock.MPNetForMaskedLM):
        for more, expected in (({"from_tf": True}, old), ({}, other)):
            weight = cls.from_pretrained(tmp_path, **more).get_input_embeddings().weight
            found = weight.detach() if hasattr(weight, "detach") else weight
            np.testing.assert_array_equal(np.asarray(found), expected.parameter(TABLE))
    with pytest.raises(ValueError, match="from_pt and from_tf"):
        monoblock.TFMPNetForMaskedLM.from_pretrained(tmp_path, from_pt=True, from_tf=True)


TABLE = "mpnet.embeddings.word_embeddings.weight"


# ---------------------------------------------------------------------------- KerasMetricCallback


def batches(*, inside: bool) -> tf.data.Dataset:
    """Two batches of 3 and 2 tokens, with labels in x or as y."""

    def rows() -> Any:
        for ids in (IDS[:, :3], IDS[:1, :2]):
            labels = ids % 3
            yield {"input_ids": ids, "labels": labels} if inside else ({"input_ids": ids}, labels)

    spec = tf.TensorSpec((None, None), tf.int32)
    x = {"input_ids": spec}
    return tf.data.Dataset.from_generator(
        rows, output_signature={**x, "labels": spec} if inside else (x, spec)
    )


@pytest.mark.parametrize("inside", [True, False], ids=["labels in x", "labels as y"])
def test_metric_callback(inside: bool) -> None:
    ours = shallow("MPNetForTokenClassification")
    calls = []

    def metric(found: Any) -> dict[str, Any]:
        calls.append(found)
        scores, labels = found
        real = labels != -100
        return {"right": (scores.argmax(-1) == labels)[real].mean()}

    data = batches(inside=inside)
    callback = monoblock.KerasMetricCallback(metric, data)
    ours.compile("sgd", jit_compile=False)
    logs = ours.fit(data, verbose=0, callbacks=[callback]).history
    scores, labels = calls[0]
    assert scores.shape == (3, 3, 4)
    np.testing.assert_array_equal(labels, [[2, 0, 2], [1, 0, 1], [2, 0, -100]])
    np.testing.assert_array_equal(scores[2, 2], [-100] * 4)
    assert_close("scores", scores[:2], ours(IDS[:, :3]).logits, 1e-5)
    assert 0 <= logs["right"][0] <= 1


def test_metric_callback_of_spans_and_generated_tokens() -> None:
    span = shallow("MPNetForQuestionAnswering")
    y = {"start_positions": np.array([0, 1]), "end_positions": np.array([1, 2])}
    calls: list[Any] = []

    def metric(found: Any) -> dict[str, float]:
        calls.append(found)
        return {"one": 1}

    own = monoblock.KerasMetricCallback(
        metric, {"input_ids": IDS, **y}, batch_size=2, output_cols=["start_logits"]
    )
    span.compile("sgd", jit_compile=False)
    assert span.fit({"input_ids": IDS, **y}, verbose=0, callbacks=[own]).history["one"] == [1.0]
    assert calls[0][0].shape == (2, 4)
    assert set(calls[0][1]) == set(y)
    text = shallow("GPTNeoForCausalLM")
    data = tf.data.Dataset.from_tensor_slices({"input_ids": IDS, "labels": IDS}).batch(2)
    how = {"max_new_tokens": 3, "do_sample": False}
    own = monoblock.KerasMetricCallback(metric, data, predict_with_generate=True, generate_kwargs=how)
    own.set_model(text)
    logs: dict[str, float] = {}
    own.on_epoch_end(0, logs)
    np.testing.assert_array_equal(calls[1][0], text.generate(IDS, **how))
    assert logs == {"one": 1.0}
    with pytest.raises(ValueError, match="needs a batch_size"):
        monoblock.KerasMetricCallback(metric, {"input_ids": IDS})
    with pytest.raises(ValueError, match="name which of input_ids they are"):
        monoblock.KerasMetricCallback(metric, {"input_ids": IDS}, batch_size=2)
    own = monoblock.KerasMetricCallback(lambda _: 3, data)
    own.set_model(text)
    with pytest.raises(TypeError, match="must return a dict of numbers, got int"):
        own.on_epoch_end(0, {})
