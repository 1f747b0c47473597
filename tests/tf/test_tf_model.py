"""TF models: the contract of calls; every form of arguments, files in both directions, dtypes, resized embeddings,
gradient checkpointing, quantisation, LoRA, and memory of attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
import v4_checkpoints
from contract.calls import CallsContract
from contract.models import CLASSES, Pair, inputs, labels, numpy
from measure import assert_close
from tf_pairs import close, model, pair, rounding_bound, shallow

import monoblock
from monoblock.backends.tf.classes import make_class
from monoblock.backends.tf.ops import relative_position_bucket
from monoblock.backends.tf.outputs import TFModelOutput, output_class
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

IDS = np.array([[5, 9, 11, 20], [7, 30, 31, 32]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])


# ---------------------------------------------------------------------------- calls


def test_arguments_in_every_form() -> None:
    ours = model("OpenAIGPTLMHeadModel")
    types = IDS % 3
    expected = ours(input_ids=IDS, attention_mask=MASK, token_type_ids=types).logits
    forms: dict[str, Any] = {
        "list": ours([IDS, MASK, types]),
        "tuple of tensors": ours(tuple(tf.constant(x) for x in (IDS, MASK, types))),
        "positional": ours(IDS, MASK, types),
        "dict": ours({"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}),
        "dict and keywords": ours({"input_ids": IDS, "attention_mask": MASK}, token_type_ids=types),
        "int32": ours([x.astype(np.int32) for x in (IDS, MASK, types)]),
        "graph": tf.function(ours, autograph=False)([tf.constant(x) for x in (IDS, MASK, types)]),
    }
    for form, out in forms.items():
        assert_close(form, out.logits, expected, 1e-5)
    assert_close("one tensor", ours(IDS).logits, ours(input_ids=IDS.tolist()).logits, 0.0)


def test_signatures_are_those_of_transformers_4() -> None:
    """The arguments of transformers 4's TF classes in order; classes that had no TF version have the family's."""
    tail = ("output_attentions", "output_hidden_states", "return_dict")
    mistral = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
    gpt = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "head_mask", "inputs_embeds")
    mpnet = ("input_ids", "attention_mask", "position_ids", "head_mask", "inputs_embeds")
    orders = {
        "MistralModel": (*mistral, "use_cache", *tail),
        "MistralForCausalLM": (*mistral, "labels", "use_cache", *tail),
        "MistralForSequenceClassification": (*mistral, "labels", "use_cache", *tail),
        "OpenAIGPTModel": (*gpt, *tail),
        "OpenAIGPTLMHeadModel": (*gpt, *tail, "labels"),
        "OpenAIGPTForSequenceClassification": (*gpt, *tail, "labels"),
        "OpenAIGPTDoubleHeadsModel": (*gpt, "mc_token_ids", *tail, "labels", "mc_labels"),
        "MPNetForTokenClassification": (*mpnet, *tail, "labels"),
        "MPNetForQuestionAnswering": (*mpnet, *tail, "start_positions", "end_positions"),
    }
    for name, order in orders.items():
        assert make_class("TF" + name).arguments == order


def test_outputs() -> None:
    ours = model("OpenAIGPTDoubleHeadsModel")
    out = ours(IDS[None], mc_token_ids=[[3, 2]], output_hidden_states=True)
    assert type(out).__name__ == "TFOpenAIGPTDoubleHeadsModelOutput"
    assert isinstance(out, TFModelOutput)
    lm, choice = out[:2]
    assert lm.shape == (1, 2, 4, 89)
    assert choice.shape == (1, 2)
    assert isinstance(ours(IDS[None], return_dict=False), tuple)
    assert len(tf.nest.flatten(out)) == 5
    kept = tf.nest.map_structure(lambda x: x, out)
    assert kept.keys() == out.keys()
    assert output_class("CausalLMOutput") is output_class("CausalLMOutput")
    ours.config.return_dict = False
    assert isinstance(ours(IDS[None]), tuple)


def test_eager_dynamic_and_compiled_calls_are_equal() -> None:
    """Eager, in a graph with dynamic lengths, and compiled."""
    ours = model("MistralForCausalLM")
    given = numpy(inputs("MistralForCausalLM", "left"))
    expected = ours(**given, use_cache=False).logits

    def run(ids: Any, mask: Any) -> Any:
        return ours(input_ids=ids, attention_mask=mask, use_cache=False).logits

    spec = tf.TensorSpec((None, None), tf.int64)
    dynamic = tf.function(run, input_signature=[spec, spec], autograph=False)
    compiled = tf.function(run, jit_compile=True, autograph=False)
    assert_close("dynamic", dynamic(*given.values()), expected, 1e-5)
    assert_close("compiled", compiled(*given.values()), expected, 5e-5)


class TestCalls(CallsContract):
    prefix = "TF"
    invalid: ClassVar = {
        r"head_mask must be \(6,\) or \(2, 6\)": (ValueError, {"input_ids": IDS, "head_mask": np.ones(5)}),
        r"keys and values": (ValueError, {"input_ids": IDS, "past_key_values": ((IDS, IDS),) * 2}),
        r"labels have 2 tokens": (ValueError, {"input_ids": IDS, "labels": IDS[:, :2]}),
    }

    def loss(self, model: Any, given: dict[str, Any], labels: Any) -> Any:
        found = model(**given, labels=labels).loss
        assert found.shape == (3,)
        return tf.reduce_mean(found)

    def test_an_argument_given_twice_raises(self, pair: Pair) -> None:
        with pytest.raises(TypeError, match="'input_ids' twice"):
            pair("GPTNeoForCausalLM")[1](IDS, input_ids=IDS)


def test_batches_need_a_pad_token_id() -> None:
    ours = model("MistralForSequenceClassification", pad_token_id=None)
    with pytest.raises(ValueError, match="no padding token is defined"):
        ours(IDS)
    assert ours(IDS[:1]).logits.shape == (1, 4)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_regression_and_multi_label_losses(kind: str, tmp_path: Path) -> None:
    size = 1 if kind == "regression" else 4
    theirs, ours = pair("MistralForSequenceClassification", tmp_path, num_labels=size)
    given = inputs("MistralForSequenceClassification", "left")
    wanted = torch.rand(3, size, generator=torch.Generator().manual_seed(0))
    expected = theirs(**given, labels=wanted).loss
    found = ours(**numpy(given), labels=wanted.numpy()).loss
    assert found.shape == (3,)
    assert_close(f"{kind} loss", tf.reduce_mean(found), expected.detach(), 1e-5)


def test_loss_with_num_items_in_batch(tmp_path: Path) -> None:
    theirs, ours = pair("MistralForCausalLM", tmp_path)
    given = inputs("MistralForCausalLM")
    wanted = labels("MistralForCausalLM", given)
    expected = theirs(**given, **wanted, num_items_in_batch=100).loss
    found = ours(**numpy(given), **numpy(wanted), num_items_in_batch=100).loss
    assert_close("loss over a count", found[0], expected.detach(), 1e-5)


def test_relative_position_buckets_equal_pytorchs() -> None:
    from monoblock.backends.pytorch.ops import relative_position_bucket as theirs

    for count, far in ((32, 128), (8, 20), (12, 90)):
        distance = np.arange(-3 * far, 3 * far, dtype=np.int32)
        expected = theirs(torch.from_numpy(distance), count, far).numpy()
        np.testing.assert_array_equal(relative_position_bucket(tf.constant(distance), count, far), expected)


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", CLASSES)
def test_saved_files_open_in_pytorch(name: str, tmp_path: Path) -> None:
    """With the same names, shapes and bits."""
    ours = model(name)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    theirs = getattr(monoblock, name).from_pretrained(tmp_path)
    held = dict(theirs.named_parameters())
    for key, values in held.items():
        np.testing.assert_array_equal(ours.parameter(key), values.detach().numpy())
    more = sum(int(np.prod(v.shape)) for key, v in ours.parameter_variables().items() if key not in held)
    assert ours.num_parameters() == theirs.num_parameters() + more
    assert not more or "pooler" in "".join(ours.parameter_variables().keys() - held.keys())


@pytest.mark.parametrize("name", v4_checkpoints.TENSORFLOW)
def test_checkpoints_of_transformers_4(name: str) -> None:
    """`tf_model.h5` of transformers 4, and the stored outputs of its classes."""
    ours = make_class(name).from_pretrained(v4_checkpoints.FOLDER / name)
    out = ours(v4_checkpoints.inputs(name), output_hidden_states=True, output_attentions=True)
    for (field, layer), wanted in v4_checkpoints.outputs(name).items():
        got = out[field] if layer is None else out[field][layer]
        assert v4_checkpoints.difference(name, field, np.asarray(got), wanted) <= v4_checkpoints.atol(
            name, ours.spec
        )


def test_dtypes(tmp_path: Path) -> None:
    theirs, ours = pair("MistralForCausalLM", tmp_path / "a")
    given = numpy(inputs("MistralForCausalLM"))
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "b")
    load = make_class("TFMistralForCausalLM").from_pretrained
    half = load(tmp_path / "b")
    assert {v.dtype for v in half.weights} == {"bfloat16"}
    assert half(**given).logits.dtype == tf.bfloat16
    half.save_pretrained(tmp_path / "c")
    again = load(tmp_path / "c", dtype="float32")
    assert {v.dtype for v in again.weights} == {"float32"}
    with torch.no_grad():
        widened = theirs.float()(torch.tensor(given["input_ids"]), output_hidden_states=True)
    close("bfloat16 read as float32", again(**given).logits, widened.logits, rounding_bound(theirs, widened))
    mixed = load(tmp_path / "a", dtype="mixed_bfloat16")
    assert {v.dtype for v in mixed.weights} == {"float32"}
    expected = ours(**given).logits
    # Eight bits of mantissa over two layers, on logits of up to 7.
    assert_close("mixed_bfloat16", mixed(**given).logits, expected, 0.4)
    with pytest.raises(ValueError, match="dtype must be"):
        load(tmp_path / "a", dtype="int8")


def test_mismatched_configs_and_arguments(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    model("MistralModel").save_pretrained(tmp_path)
    make_class("TFMistralForTokenClassification").from_pretrained(tmp_path, num_labels=7)
    assert any("newly initialised" in m and "score.weight" in m for m in logs.messages)
    load = make_class("TFMistralModel").from_pretrained
    with pytest.raises(ShapeMismatch, match="and the weights belong together"):
        load(tmp_path, intermediate_size=51)
    with pytest.raises(CheckpointError):
        load(tmp_path, num_hidden_layers=1)
    assert (
        load(tmp_path, intermediate_size=51, ignore_mismatched_sizes=True)(IDS).last_hidden_state.shape[2]
        == 36
    )
    for name, value in {"device_map": "auto", "load_in_8bit": True, "attn_implementation": "eager"}.items():
        with pytest.raises(ValueError, match=f"does not take {name}"):
            load(tmp_path, **{name: value})
    with pytest.raises(TypeError, match="does not know the argument 'nonsense'"):
        load(tmp_path, nonsense=1)
    with pytest.raises(ValueError, match="takes a MistralConfig"):
        make_class("TFMistralModel")(monoblock.GPTNeoConfig())


# ---------------------------------------------------------------------------- sizes and gradients


@pytest.mark.parametrize("name", ["OpenAIGPTDoubleHeadsModel", "MistralForCausalLM", "MPNetForMaskedLM"])
def test_resized_embeddings(name: str, tmp_path: Path) -> None:
    ours = model(name)
    ids = IDS[None] if "Double" in name else IDS
    before = ours(ids).logits
    assert ours.resize_token_embeddings(91).input_dim == 91
    after = ours(ids).logits
    assert after.shape[-1] == ours.config.vocab_size == 91
    assert_close("resized", after[..., :89], before, 1e-6)
    ours.resize_token_embeddings(pad_to_multiple_of=16)
    ours.save_pretrained(tmp_path)
    assert type(ours).from_pretrained(tmp_path)(ids).logits.shape[-1] == 96
    with tf.GradientTape() as tape:
        loss = ours(ids, labels=ids, training=True).loss
    assert all(g is not None for g in tape.gradient(loss, [ours.get_input_embeddings().embeddings.value]))


def test_dropout_and_gradient_checkpointing() -> None:
    """The same seed drops the same entries, with and without recomputation in the backward pass."""
    dropouts = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    ours = model("MPNetForSequenceClassification", **dropouts)
    wanted = np.array([1, 0])
    assert_close("evaluation", ours(IDS).logits, ours(IDS).logits, 0.0)

    def gradients(checkpointing: bool) -> list[Any]:
        ours.main.gradient_checkpointing = checkpointing
        ours.seeds.state.assign([3, 7])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(ours(IDS, labels=wanted, training=True).loss)
        found = tape.gradient(loss, ours.trainable_variables)
        return [loss, *(tf.convert_to_tensor(x) for x in found if x is not None)]

    plain, recomputed = gradients(False), gradients(True)
    for a, b in zip(plain, recomputed, strict=True):
        assert_close("recomputed", b, a, 1e-6)
    other = ours(IDS, labels=wanted, training=True).loss
    assert abs(float(tf.reduce_mean(other)) - float(plain[0])) > 1e-4


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("name", ["MistralForCausalLM", "OpenAIGPTLMHeadModel", "MPNetForMaskedLM"])
def test_keras_quantises(name: str, tmp_path: Path) -> None:
    """`model.quantize("int8")`, with tied heads and shared tables."""
    ours = shallow(name)
    before = ours(IDS).logits
    ours.quantize("int8")
    matrices = [v for v in ours.variables if v.name == "kernel" or (v.name == "weight" and len(v.shape) == 2)]
    assert {v.dtype for v in matrices} == {"int8"}
    error = np.abs(ours(IDS).logits - before).max() / np.abs(before).max()
    assert 0 < error < 0.2  # 8 bits, random weights, one layer: measured below 0.1
    with pytest.raises(ValueError, match="quantised weights cannot be saved"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised weights cannot be resized"):
        ours.resize_token_embeddings(100)


def test_lora_weights_are_merged_when_saved(tmp_path: Path) -> None:
    """Keras's `enable_lora` on a dense layer; the files hold the merged weights."""
    ours = model("MistralForCausalLM")
    before = ours(IDS).logits
    layer = ours.model.layers[0].self_attn.k_proj
    layer.enable_lora(4)
    layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.1))
    after = ours(IDS).logits
    assert np.abs(after - before).max() > 0.1
    ours.save_pretrained(tmp_path)
    assert_close("merged", type(ours).from_pretrained(tmp_path)(IDS).logits, after, 1e-5)


def test_variables_by_their_names_in_files() -> None:
    ours = model("MPNetForMaskedLM")
    path = "/mpnet/encoder/layer_._1/attention/attn/q/kernel"
    assert ours.variable("mpnet.encoder.layer.1.attention.attn.q.weight").path.endswith(path)
    assert ours.variable("lm_head.bias") is ours.lm_head.bias is ours.get_bias()["bias"]
    assert ours.parameter("mpnet.encoder.layer.0.intermediate.dense.weight").shape == (50, 36)


def every_op(graph: Any) -> Any:
    """The operations of a graph and of the functions that it calls."""
    yield from graph.get_operations()
    for function in graph.as_graph_def().library.function:
        yield from graph._get_function(function.signature.name).graph.get_operations()


@pytest.mark.parametrize("tokens", [2048, None])
@pytest.mark.parametrize("name", ["MptForCausalLM", "MPNetForMaskedLM"])
def test_attention_allocates_no_matrix_of_all_queries_and_keys(name: str, tokens: int | None) -> None:
    """Every array in the graph of a training step is at most of the size of one query block, or of the logits."""
    small = (
        {"n_layers": 1}
        if name.startswith("Mpt")
        else {"num_hidden_layers": 1, "max_position_embeddings": 2050}
    )
    ours = model(name, **small)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec((1, tokens), tf.int32)])
    def step(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = ours(ids, labels=ids, training=True).loss
        return tape.gradient(loss, [v.value for v in ours.trainable_variables])

    ops = list(every_op(step.get_concrete_function().graph))
    shapes = [out.shape for op in ops for out in op.outputs]
    known = [shape for shape in shapes if shape.rank and shape.rank >= 3]
    assert any(shape.rank == 4 and shape[1] == 6 for shape in known)
    if tokens is None:  # of a dynamic length, only the keys may be dynamic
        assert not [s for s in known if s.rank == 4 and s[1] == 6 and s[2] is None and s[3] is None]
    else:
        assert max(s.num_elements() or 0 for s in known) <= 6 * 256 * tokens
        # Each of the eight blocks once in the forward pass, and once recomputed in the backward pass.
        assert len({op.name for op in ops if op.type == "Softmax"}) == 16


# ---------------------------------------------------------------------------- processes


def ran(code: str, **environment: str) -> str:
    """The output of a new process, stderr included."""
    env = (
        {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
        | environment
        | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    return done.stdout + done.stderr


def test_torch_and_jax_are_not_imported(tmp_path: Path) -> None:
    """Neither by the import nor by loading, calling and training a model."""
    model("MPNetForSequenceClassification").save_pretrained(tmp_path)
    found = ran(
        "import sys, numpy as np\n"
        "from monoblock.backends.tf.classes import make_class\n"
        f"m = make_class('TFMPNetForSequenceClassification').from_pretrained({str(tmp_path)!r})\n"
        "m.compile('sgd', run_eagerly=True)\n"
        "m.fit(np.full((2, 5), 7), np.array([0, 1]), verbose=0)\n"
        "print('loaded:', [n for n in ('torch', 'jax', 'transformers') if n in sys.modules])"
    )
    assert "loaded: []" in found


def test_other_keras_backends_raise() -> None:
    code = "import monoblock.backends.tf.classes"
    message = "need Keras on TensorFlow, but KERAS_BACKEND='torch': set it to 'tensorflow', or unset it"
    assert message in ran(code, KERAS_BACKEND="torch")
    running = ran("import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras\n" + code)
    assert "Keras runs on 'torch' in this process" in running


def test_layer_names() -> None:
    assert [layer.name for layer in model("MistralForCausalLM").layers] == ["model", "lm_head"]
    assert keras.backend.backend() == "tensorflow"


def test_tf_legacy_loss_raises() -> None:
    with pytest.raises(UnsupportedConfig, match="tf_legacy_loss=True: not supported, losses are a mean"):
        monoblock.TFMPNetForTokenClassification(monoblock.MPNetConfig(tf_legacy_loss=True))
