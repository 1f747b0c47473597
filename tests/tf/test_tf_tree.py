"""The layers of TF models equal those of transformers 4's TF classes: names, shapes and order of all weights,
attributes, main layers. Classes that had no TF version follow the naming rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import v4_checkpoints
from contract.models import CLASSES, fields
from measure import assert_close
from tf_pairs import model

import monoblock
from monoblock.backends.tf.classes import make_class
from monoblock.backends.tf.parts import is_plain
from monoblock.families import FAMILIES, family_of

IDS = np.array([[5, 9, 11, 20], [7, 30, 31, 32]])
Weights = list[tuple[str, tuple[int, ...]]]


def recorded(name: str) -> Weights:
    """Names and shapes of a `tf_model.h5`, in the order of the class that wrote it; shared weights once."""
    found: dict[str, tuple[int, ...]] = {}
    with h5py.File(v4_checkpoints.FOLDER / name / "tf_model.h5") as file:
        for layer in file.attrs["layer_names"]:
            for weight in file[layer].attrs["weight_names"]:
                found.setdefault(weight.removesuffix(":0"), file[layer][weight].shape)
    return list(found.items())


def held(ours: Any) -> Weights:
    return [(v.path, tuple(v.shape)) for v in ours.weights]


@pytest.mark.parametrize("name", v4_checkpoints.TENSORFLOW)
def test_weights_are_those_of_transformers_4(name: str) -> None:
    keras.backend.clear_session()  # so that no number is added to the model's name
    assert held(make_class(name).from_pretrained(v4_checkpoints.FOLDER / name)) == recorded(name)


def test_every_tf_class_of_transformers_4_is_covered() -> None:
    assert len(v4_checkpoints.TENSORFLOW) == 13


# The naming rule: the module names of the PyTorch class, layers numbered as in the family's TF classes, where there
# were any, or else `h_._0`, and Keras's names of variables; `weight` for RMS norms.
LEAVES = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "weight": "weight"}
LEAVES |= {"bias": "bias", "beta": "bias"}
# The pooler of the main layer in transformers 4, which the PyTorch classes with these heads omit.
POOLER = {"mpnet.pooler.dense.weight", "mpnet.pooler.dense.bias"}


@pytest.mark.parametrize("name", CLASSES)
def test_weight_names_follow_the_pytorch_class(name: str) -> None:
    ours, theirs = model(name), getattr(monoblock, name)(family_of(name).config(**fields(name)))
    prefix = ours.family.prefix
    headed = ours.row.head not in (None, "pooler")
    found = {}
    for variable in ours.weights:
        _, *steps, leaf = variable.path.split("/")
        if not headed:
            assert steps.pop(0) == prefix
        stem = ".".join(steps).replace("_._", ".")
        shape = tuple(variable.shape)
        found[f"{stem}.{LEAVES[leaf]}"] = (
            shape[::-1] if leaf == "kernel" else shape[-1:] if leaf == "bias" else shape
        )
    tied = set(theirs.tied())
    expected = {key: tuple(x.shape) for key, x in theirs.state_dict().items() if key not in tied}
    assert {key: shape for key, shape in found.items() if key not in POOLER or key in expected} == expected
    assert ours.parameter_variables().keys() == found.keys()


def test_names_of_norm_and_embedding_variables() -> None:
    """In a family that had no TF classes, and in one that had."""
    mpt = [v.path.partition("/")[2] for v in model("MptForCausalLM").weights]
    assert "transformer/wte/embeddings" in mpt
    assert "transformer/blocks_._0/norm_1/gamma" in mpt
    assert "transformer/blocks_._0/attn/Wqkv/kernel" in mpt
    mistral = [v.path.partition("/")[2] for v in model("MistralForTokenClassification").weights]
    assert "model/layers.1/input_layernorm/weight" in mistral
    assert "score/kernel" in mistral


def test_attributes_are_those_of_transformers_4() -> None:
    mpnet = model("MPNetForSequenceClassification")
    layer = mpnet.mpnet.encoder.layer[0]
    assert layer.attention.attn.q.kernel.shape == (36, 36)
    assert (
        layer.out.dense.name == "dense" and layer.out.name == "output"
    )  # Keras layers have an attribute `output`
    assert mpnet.mpnet.embeddings.weight.shape == (89, 36)
    assert mpnet.classifier.out_proj.bias.shape == (4,)
    assert mpnet.mpnet.embeddings.LayerNorm.beta is mpnet.mpnet.embeddings.LayerNorm.weights[1]
    gpt = model("OpenAIGPTDoubleHeadsModel")
    assert gpt.transformer.h[1].mlp.c_fc.weight.shape == (36, 144)
    assert gpt.transformer.h[1].mlp.c_fc.bias.shape == (1, 144)
    assert gpt.multiple_choice_head.summary.kernel.shape == (36, 1)
    mistral = model("MistralForCausalLM")
    assert mistral.model.layers[0].self_attn.k_proj.kernel.shape[0] == 36
    assert mistral.model.layers[0].input_layernorm.weight.shape == (36,)
    assert mistral.lm_head.kernel.shape == (36, 89)


def test_class_names_are_those_of_transformers_4() -> None:
    mpnet = model("MPNetModel").mpnet
    layers = [mpnet, mpnet.embeddings, mpnet.encoder, mpnet.pooler, mpnet.encoder.layer[0].attention.attn]
    assert [type(layer).__name__ for layer in layers] == [
        "TFMPNetMainLayer",
        "TFMPNetEmbeddings",
        "TFMPNetEncoder",
        "TFMPNetPooler",
        "TFMPNetSelfAttention",
    ]


def test_replaced_layers_take_effect() -> None:
    ours = model("MistralModel")
    before = ours(IDS).last_hidden_state
    mlp = ours.model.layers[1].mlp
    mlp.down_proj.trainable = False
    assert "layers.1/mlp/down_proj" not in "".join(v.path for v in ours.trainable_weights)
    mlp._tracker.unlock()
    mlp.down_proj = keras.layers.Dense(36, kernel_initializer="zeros")
    mlp._tracker.lock()
    assert np.abs(ours(IDS).last_hidden_state - before).max() > 1e-3


def test_eager_calls_equal_keras_calls() -> None:
    """Eager calls bypass Keras for plain layers, with the same results; changes to a layer take effect."""
    ours = model("MistralModel")
    expected = tf.function(ours, autograph=False)(tf.constant(IDS)).last_hidden_state
    assert_close("eager", ours(IDS).last_hidden_state, expected, 1e-5)
    dense = ours.model.layers[1].mlp.up_proj
    assert is_plain(dense)
    changes: dict[str, Any] = {
        "call": lambda x: x[..., :1] * 0 + tf.zeros((1, 1, dense.units)),
        "activation": keras.activations.relu,
    }
    for name, value in changes.items():
        held = getattr(dense, name)
        setattr(dense, name, value)
        assert not is_plain(dense)
        assert np.abs(ours(IDS).last_hidden_state - expected).max() > 1e-3, name
        if name == "call":
            del dense.call
        else:
            setattr(dense, name, held)
    dense.enable_lora(2)
    assert not is_plain(dense)
    mixed = make_class("TFMistralModel")(ours.config, dtype="mixed_bfloat16")
    assert not is_plain(mixed.model.layers[0].mlp.up_proj)
    assert mixed(IDS).last_hidden_state.dtype == tf.bfloat16


def test_dropouts_are_layers() -> None:
    """Their rates can be changed."""
    ours = model("MPNetForTokenClassification", hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.0)
    wanted = np.ones_like(IDS)
    assert ours(IDS, labels=wanted, training=True).loss[0] != ours(IDS, labels=wanted, training=True).loss[0]
    rates = [layer for layer in ours._flatten_layers() if type(layer).__name__ == "Dropout"]
    assert {layer.rate for layer in rates} == {0.4, 0.0}
    for layer in rates:
        layer.rate = 0.0
    assert_close("no dropout", ours(IDS, training=True).logits, ours(IDS).logits, 0.0)


# ---------------------------------------------------------------------------- main layers


@pytest.mark.parametrize("name", CLASSES)
def test_main_layers(name: str) -> None:
    """The attribute with the family's prefix is the bare model, and is called like it."""
    ours = model(name)
    main = getattr(ours, ours.family.prefix)
    assert main is ours.base_model
    stem = FAMILIES[ours.family.name][0]
    assert type(main) is getattr(monoblock, f"TF{stem}MainLayer")
    assert isinstance(ours, getattr(monoblock, f"TF{stem}PreTrainedModel"))
    out = main(IDS, attention_mask=np.ones_like(IDS), output_hidden_states=True)
    assert len(out.hidden_states) == ours.spec.layers + 1
    assert_close("last state", out.hidden_states[-1], out.last_hidden_state, 0.0)
    assert isinstance(main(IDS, return_dict=False), tuple)
    if not ours.headed:
        assert ours.layers[0] is main
        whole = ours(IDS)
        assert type(whole) is type(out)
        assert_close("main layer", main(IDS).last_hidden_state, whole.last_hidden_state, 0.0)


def test_main_layers_inside_other_models(tmp_path: Path) -> None:
    """`keras.Model(ids, head(body.layers[0](ids)[1]))`, a common form; and a main layer alone."""
    body = model("MPNetModel")
    ids = keras.Input((None,), dtype="int32")
    pooled = body.layers[0](ids)[1]
    whole = keras.Model(ids, keras.layers.Dense(3)(pooled))
    whole.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    whole.fit(IDS.astype(np.int32), np.array([0, 2]), verbose=0)
    whole.save(tmp_path / "whole.keras")
    again = keras.saving.load_model(tmp_path / "whole.keras")
    assert_close("saved", again(IDS), whole(IDS), 0.0)
    alone = monoblock.TFMPNetMainLayer(body.config, name="mpnet")
    assert alone(IDS).pooler_output.shape == (2, 36)
    assert [v.path for v in alone.weights] == [v.path.partition("/")[2] for v in body.weights]
    fields = body.config.to_dict() | {"hidden_dropout_prob": 0.5}
    dropped = monoblock.TFMPNetMainLayer(monoblock.MPNetConfig.from_dict(fields))
    assert np.abs(dropped(IDS, training=True)[0] - dropped(IDS)[0]).max() > 0.1


def test_base_classes_and_unknown_classes_raise() -> None:
    with pytest.raises(
        TypeError, match="TFMPNetPreTrainedModel is only the base of TFMPNetModel, TFMPNetForMaskedLM"
    ):
        monoblock.TFMPNetPreTrainedModel(monoblock.MPNetConfig())
    with pytest.raises(AttributeError, match="no class 'TFBertMainLayer'"):
        make_class("TFBertMainLayer")


# ---------------------------------------------------------------------------- files


def test_unused_pooler(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    """Loaded and saved if the files have it; otherwise it is initialised without a warning, and not saved."""
    load = monoblock.TFMPNetForMaskedLM.from_pretrained
    old = load(v4_checkpoints.FOLDER / "TFMPNetForMaskedLM")
    with h5py.File(v4_checkpoints.FOLDER / "TFMPNetForMaskedLM" / "tf_model.h5") as file:
        kernel = file["mpnet/tfmp_net_for_masked_lm/mpnet/pooler/dense/kernel:0"][()]
    np.testing.assert_array_equal(old.mpnet.pooler.dense.kernel, kernel)
    old.save_pretrained(tmp_path / "old")
    np.testing.assert_array_equal(load(tmp_path / "old").mpnet.pooler.dense.kernel, kernel)
    bare = monoblock.TFMPNetModel.from_pretrained(tmp_path / "old")
    np.testing.assert_array_equal(bare.mpnet.pooler.dense.kernel, kernel)
    monoblock.MPNetForMaskedLM.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "without")
    logs.clear()
    without = load(tmp_path / "without")
    assert not logs.messages
    assert np.asarray(without.mpnet.pooler.dense.kernel).std() > 0.1
    assert "mpnet.pooler.dense.weight" not in without.hub_state_dict()
    inside = load(v4_checkpoints.FOLDER / "TFMPNetModel")  # from a bare model, whose names have no prefix
    assert "mpnet.pooler.dense.weight" in inside.hub_state_dict()


def test_h5_files(tmp_path: Path) -> None:
    """`model.save("x.h5")` and `keras.saving.load_model`; `load_weights` of a `tf_model.h5`."""
    ours = model("MPNetForTokenClassification")
    ours.save(tmp_path / "whole.h5")
    again = keras.saving.load_model(tmp_path / "whole.h5")
    assert type(again) is type(ours)
    assert_close("h5", again(IDS).logits, ours(IDS).logits, 0.0)
    for name in v4_checkpoints.TENSORFLOW:
        expected = make_class(name).from_pretrained(v4_checkpoints.FOLDER / name)
        fresh = make_class(name)(expected.config)
        fresh.load_weights(v4_checkpoints.FOLDER / name / "tf_model.h5")
        for a, b in zip(fresh.weights, expected.weights, strict=True):
            np.testing.assert_array_equal(a, b)
