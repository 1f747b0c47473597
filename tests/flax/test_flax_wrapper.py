"""Flax models: the contract of calls; signatures, parameters, dtypes, outputs, caches, and JAX's transformations."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import flax.core
import invalid_inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.calls import CallsContract
from flax_models import CLASSES, config_of, flax_model, ids_of
from jax.sharding import Mesh, PartitionSpec
from measure import assert_close

import monoblock
from monoblock.backends.flax import loading, pretrained
from monoblock.backends.flax.arrays import JaxOps
from monoblock.backends.flax.outputs import output_class
from monoblock.backends.flax.pretrained import ELSEWHERE
from monoblock.errors import ShapeMismatch
from monoblock.generation import scores

NAME = "GPTNeoForCausalLM"
CALL = {
    "input_ids": None,
    "attention_mask": None,
    "position_ids": None,
    "params": None,
    "past_key_values": None,
    "dropout_rng": None,
    "train": False,
    "output_attentions": None,
    "output_hidden_states": None,
    "return_dict": None,
}
ATOL = 1e-5  # fp32, 2 layers, logits of about 10; measured 4e-6


def layer(params: Any, index: int) -> Any:
    """The parameters of a layer of the causal model."""
    return params["transformer"]["h"][str(index)]


def defaults(function: Any) -> dict[str, Any]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind in kinds}


@pytest.mark.parametrize("name", CLASSES)
def test_documented_signatures(name: str) -> None:
    cls = getattr(monoblock, "Flax" + name)
    _, *made = inspect.signature(cls.__init__).parameters.values()
    assert [(p.name, p.default) for p in made[1:5]] == [
        ("input_shape", (1, 1)),
        ("seed", 0),
        ("dtype", jnp.float32),
        ("_do_init", True),
    ]
    assert made[0].name == "config" and made[5].kind is inspect.Parameter.VAR_KEYWORD
    called = defaults(cls.__call__)
    assert called.pop("self") is inspect.Parameter.empty
    assert list(called.items()) == list(CALL.items())
    assert cls.framework == "flax" and cls.__module__ == "monoblock" and cls.__name__ == "Flax" + name


@pytest.mark.parametrize("name", CLASSES)
def test_params_shape_tree_is_that_of_module_init(name: str) -> None:
    model = getattr(monoblock, "Flax" + name)(config_of(name), _do_init=False)
    given = {"input_ids": jnp.zeros((1, 3), jnp.int32)}
    made = jax.eval_shape(
        lambda key: model.module.init(key, given, method="run")["params"], jax.random.PRNGKey(0)
    )
    shapes = {path: leaf.shape for path, leaf in loading.flat(made).items()}
    assert shapes == {path: leaf.shape for path, leaf in loading.flat(model.params_shape_tree).items()}
    assert model.required_params == set(shapes)
    assert model.num_params() == sum(int(np.prod(shape)) for shape in shapes.values())


# ---------------------------------------------------------------------------- parameters


def test_random_parameters_are_determined_by_the_seed() -> None:
    cls, config = monoblock.FlaxGPTNeoForCausalLM, config_of(NAME)
    one, two, other = cls(config), cls(config, seed=0), cls(config, seed=1)
    assert one._params is None  # initialised at first use
    kernel, same, different = (layer(m.params, 1)["mlp"]["c_fc"]["kernel"] for m in (one, two, other))
    assert np.array_equal(kernel, same) and not np.allclose(kernel, different)
    assert abs(float(kernel.std()) - config.initializer_range) < 2e-3  # 3,888 draws, 9 standard errors
    assert not np.allclose(kernel, layer(one.params, 0)["mlp"]["c_fc"]["kernel"])
    leaves = loading.flat(one.params)
    assert {float(x.max()) for p, x in leaves.items() if p[-1] == "bias"} == {0.0}
    assert {float(x.min()) for p, x in leaves.items() if p[-1] == "scale"} == {1.0}
    assert {x.dtype for x in leaves.values()} == {jnp.dtype("float32")}


def test_init_weights_under_jit_and_for_missing_parameters() -> None:
    model = monoblock.FlaxGPTNeoForTokenClassification(config_of("GPTNeoForTokenClassification"))
    plain = model.init_weights(model.key, (1, 1))
    traced = jax.jit(model.init_weights, static_argnames=["input_shape"])(model.key, (1, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, traced)
    table = plain["transformer"]["wte"]["embedding"] + 1
    body = {"transformer": {**plain["transformer"], "wte": {"embedding": table}}}
    whole = model.init_weights(model.key, params=flax.core.freeze(body))
    assert np.array_equal(whole["transformer"]["wte"]["embedding"], table)
    assert np.array_equal(whole["classifier"]["kernel"], plain["classifier"]["kernel"])


def test_params_first_used_inside_a_trace() -> None:
    model = monoblock.FlaxGPTNeoModel(config_of("GPTNeoModel"))
    total = jax.jit(lambda: sum(x.sum() for x in jax.tree.leaves(model.params)))()
    assert np.isfinite(float(total))
    assert not isinstance(model.params["wte"]["embedding"], jax.core.Tracer)


def test_do_init_false() -> None:
    kept = flax_model(NAME)
    model = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME), _do_init=False)
    for use in (lambda: model.params, lambda: model(ids_of())):
        with pytest.raises(ValueError, match=r"_do_init=False and has no params.* pass them"):
            use()
    with pytest.raises(ValueError, match="has no params"):
        model.params = kept.params
    assert np.array_equal(model(ids_of(), params=kept.params).logits, kept(ids_of()).logits)
    assert model.init_weights(jax.random.PRNGKey(1)).keys() == kept.params.keys()


def test_params_of_another_structure_raise() -> None:
    model = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME))
    tree = flax_model(NAME).params
    model.params = flax.core.freeze(tree)
    assert type(model.params) is dict
    body = tree["transformer"]
    with pytest.raises(ValueError, match=r"params lack transformer/wte/embedding$"):
        model.params = {"transformer": {name: value for name, value in body.items() if name != "wte"}}
    with pytest.raises(
        ValueError, match="params hold lm_head/kernel, which FlaxGPTNeoForCausalLM does not have"
    ):
        model.params = tree | {"lm_head": {"kernel": np.zeros(3)}}
    with pytest.raises(ShapeMismatch, match=r"transformer/wte/embedding is \[3, 36\], expected \[89, 36\]"):
        model.params = {"transformer": {**body, "wte": {"embedding": np.zeros((3, 36))}}}
    with pytest.raises(ValueError, match="params lack transformer/wte/embedding"):  # in a call too
        model(ids_of(), params={"transformer": {"wpe": np.zeros(3)}})
    assert np.array_equal(
        model(ids_of(), params=flax.core.freeze(tree)).logits, flax_model(NAME)(ids_of()).logits
    )


def test_dtype_is_that_of_computation() -> None:
    params = flax_model(NAME).params
    for dtype in (jnp.bfloat16, "bfloat16"):
        model = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME), dtype=dtype, _do_init=False)
        assert model(ids_of(), params=params).logits.dtype == jnp.bfloat16
        assert model.init_cache(2, 9).keys[0].dtype == jnp.bfloat16
    for wrong in (jnp.int32, "double trouble"):
        with pytest.raises(ValueError, match=r"dtype must be jnp.float32, float16 or bfloat16, got "):
            monoblock.FlaxGPTNeoForCausalLM(config_of(NAME), dtype=wrong)


def test_to_bf16_fp16_and_fp32() -> None:
    model = flax_model(NAME)
    for cast, dtype in (
        (model.to_bf16, jnp.bfloat16),
        (model.to_fp16, jnp.float16),
        (model.to_fp32, jnp.float32),
    ):
        assert {x.dtype for x in jax.tree.leaves(cast(model.params))} == {jnp.dtype(dtype)}
    mask = loading.nested({p: p[-1] != "scale" for p in loading.flat(model.params)})
    cast = loading.flat(model.to_bf16(model.params, mask))
    assert {p[-1] for p, x in cast.items() if x.dtype == jnp.float32} == {"scale"}
    assert (
        model.params["transformer"]["wte"]["embedding"].dtype == jnp.float32
    )  # the model's parameters are unchanged


# ---------------------------------------------------------------------------- calls


def test_inputs_of_any_array_type() -> None:
    model, ids = flax_model(NAME), ids_of()
    expected = model(ids).logits
    for given in (ids.tolist(), jnp.asarray(ids), ids.astype(np.int32), ids.astype(np.uint8)):
        assert np.array_equal(model(given).logits, expected)
    ones = np.ones_like(ids)
    for mask in (ones, ones.astype(bool), ones.astype(np.float32), ones.tolist(), jnp.asarray(ones)):
        assert np.array_equal(model(ids, mask).logits, expected)
    before = pretrained.forward._cache_size()
    model(ids, ones)
    assert pretrained.forward._cache_size() == before


def test_outputs_are_pytrees_dicts_and_tuples() -> None:
    model, ids = flax_model(NAME), ids_of()
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert type(out) is monoblock.FlaxCausalLMOutputWithCrossAttentions
    assert isinstance(out, monoblock.FlaxMaskedLMOutput)  # the class documented for this family
    assert list(out) == ["logits", "hidden_states", "attentions"]
    assert out[0] is out.logits is out["logits"] and "loss" not in out
    assert [x.shape for x in out.hidden_states] == [(2, 7, 36)] * 3
    assert [x.shape for x in out.attentions] == [(2, 6, 7, 7)] * 2
    doubled = jax.tree.map(lambda x: 2 * x, out)
    assert type(doubled) is type(out) and np.array_equal(doubled.logits, 2 * out.logits)
    assert list(out.replace(logits=None)) == ["hidden_states", "attentions"]
    flat = model(ids, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(flat, tuple) and len(flat) == 3


def test_output_classes_are_transformers() -> None:
    kinds = {
        "MistralModel": "FlaxBaseModelOutputWithPast",
        "MistralForCausalLM": "FlaxCausalLMOutputWithCrossAttentions",
        "GPTNeoModel": "FlaxBaseModelOutput",
        "MPNetModel": "FlaxBaseModelOutputWithPooling",
        "OpenAIGPTLMHeadModel": "FlaxCausalLMOutput",
        "OpenAIGPTDoubleHeadsModel": "FlaxOpenAIGPTDoubleHeadsModelOutput",
    }
    for name, kind in kinds.items():
        cls = getattr(monoblock, "Flax" + name)
        made = pretrained.output_class(cls.row.output)
        assert issubclass(made, getattr(monoblock, kind)) and made.__name__.startswith("Flax")
        first, *_ = made.__dataclass_fields__
        assert jax.tree.leaves(made(**{first: 1})) == [1]


def chunked(model: Any, ids: np.ndarray, mask: Any, whole_mask: bool) -> Any:
    """Logits of a sequence in three chunks with a cache of 10 slots."""
    past, start, logits = model.init_cache(2, 10), 0, []
    for stop in (4, 5, ids.shape[1]):
        visible = mask
        if mask is not None:
            visible = mask[:, :stop]
            pad = ((0, 0), (0, 10 - stop))
            visible = np.pad(visible, pad, constant_values=1) if whole_mask else visible
        out = model(ids[:, start:stop], attention_mask=visible, past_key_values=past)
        assert list(out) == ["logits", "past_key_values"]
        past, start = out.past_key_values, stop
        logits.append(out.logits)
    assert int(past.get_seq_length()) == ids.shape[1]
    return jnp.concatenate(logits, axis=1)


def test_chunks_with_a_cache_equal_one_pass() -> None:
    model, ids = flax_model(NAME), ids_of(tokens=9)
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    for given in (None, mask):
        expected = np.asarray(model(ids, given).logits)
        for whole_mask in (False, True) if given is not None else (False,):
            got = chunked(model, ids, given, whole_mask)
            assert_close("flax: in chunks", got, expected, ATOL, given)


def test_logits_to_keep() -> None:
    model, ids = flax_model(NAME), ids_of()
    assert_close("flax: kept logits", model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:], ATOL)


IDS = ids_of(2, 6)


@functools.cache
def zero_output(model: Any) -> Any:
    """The output of a model with zeros of the right shapes: a loss reads no more than these to check its labels."""
    ids = invalid_inputs.CHOICES if model.row.head in ("double", "choice") else invalid_inputs.IDS
    shapes = jax.eval_shape(lambda: dict(model(ids, params=model.params).items()))
    return output_class(model.row.output)(**{key: jnp.zeros(x.shape) for key, x in shapes.items()})


class TestCalls(CallsContract):
    prefix = "Flax"
    invalid: ClassVar = {
        r"past_key_values must come from init_cache\(batch, max_length\) or an output, got dict": (
            ValueError,
            {"input_ids": IDS, "past_key_values": {}},
        ),
        r"logits_to_keep must be the number": (ValueError, {"input_ids": IDS, "logits_to_keep": -1}),
        r"no argument 'labels': model.compute_loss\(outputs, labels=...\) gives the loss": (
            TypeError,
            {"input_ids": IDS, "labels": IDS},
        ),
        r"no argument 'use_cache': .*init_cache": (TypeError, {"input_ids": IDS, "use_cache": True}),
    }

    def call(self, model: Any, **given: Any) -> Any:
        labels = {key: x for key, x in given.items() if key in ELSEWHERE}
        if labels:
            model.compute_loss(zero_output(model), **labels)
        return model(**given)

    def loss(self, model: Any, given: dict[str, Any], labels: Any) -> Any:
        return model.compute_loss(model(**given), labels=labels)

    def test_training_with_dropout_needs_a_key(self) -> None:
        model = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME, embed_dropout=0.1))
        with pytest.raises(ValueError, match="train=True applies dropout: give dropout_rng"):
            model(IDS, train=True)

    def test_seeds_of_models_have_64_bits(self) -> None:
        with pytest.raises(ValueError, match="seed must be"):
            _ = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME), seed=10**23).params


def test_powers_stay_finite() -> None:
    """In a compiled loop, where the exponent is a device array."""
    found = jax.jit(lambda n: scores.power(JaxOps(), 1.9, n))(jnp.int32(2000))
    assert float(found) == pytest.approx(1e30)


def test_unknown_constructor_arguments_raise() -> None:
    with pytest.raises(ValueError, match="FlaxGPTNeoModel takes a GPTNeoConfig, got MptConfig"):
        monoblock.FlaxGPTNeoModel(config_of("MptModel"))
    with pytest.raises(TypeError, match="FlaxGPTNeoModel has no argument 'dtyp'"):
        monoblock.FlaxGPTNeoModel(config_of("GPTNeoModel"), dtyp=jnp.float32)


# ---------------------------------------------------------------------------- JAX


def test_under_jit_grad_vmap_checkpoint_and_shard_map() -> None:
    model, ids = flax_model(NAME), jnp.asarray(IDS)

    def loss(params: Any, ids: Any) -> jax.Array:
        return model.compute_loss(model(ids, params=params), labels=ids)

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params, ids)
    assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(layer(gradient, 0)))
    expected = np.asarray(model(ids).logits)
    by_row = jax.vmap(lambda row: model(row[None]).logits[0])(ids)
    assert_close("flax: under vmap", by_row, expected, ATOL)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(model.params, ids)
    jax.tree.map(lambda a, b: assert_close("flax: under checkpoint", a, b, 1e-5), again, gradient)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    rows = PartitionSpec("data")
    apply = jax.shard_map(
        lambda p, x: model(x, params=p), mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows
    )
    assert_close("flax: under shard_map", apply(model.params, ids).logits, expected, ATOL)
    assert np.isfinite(float(value))


def test_decoding_step_with_a_traced_cache() -> None:
    model, ids = flax_model(NAME), ids_of(tokens=9)

    @jax.jit
    def step(past: Any, token: Any, mask: Any) -> Any:
        out = model(token, attention_mask=mask, past_key_values=past)
        return out.past_key_values, out.logits

    past = model(ids[:, :7], past_key_values=model.init_cache(2, 9)).past_key_values
    logits = []
    for i in (7, 8):
        past, out = step(past, ids[:, i : i + 1], np.ones((2, 9)))
        logits.append(out)
    assert_close("flax: a traced cache", jnp.concatenate(logits, 1), model(ids).logits[:, 7:], ATOL)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, tokens\) = \(2, 9\)"):
        step(past, ids[:, :1], np.ones((2, 8)))


def test_dropout_depends_on_its_key() -> None:
    config = config_of(NAME, embed_dropout=0.5, resid_dropout=0.5, attention_dropout=0.5)
    model = monoblock.FlaxGPTNeoForCausalLM(config, seed=3)
    one, two = jax.random.split(jax.random.PRNGKey(0))
    a, b, c = (model(IDS, train=True, dropout_rng=key).logits for key in (one, one, two))
    assert np.array_equal(a, b) and not np.allclose(a, c)
    rest = model(IDS, dropout_rng=one).logits  # without training, the key has no effect
    assert np.array_equal(rest, model(IDS).logits) and not np.allclose(rest, a)


def test_gradient_checkpointing_keeps_the_gradients() -> None:
    model = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME), _do_init=False)
    params = flax_model(NAME).params

    def gradient() -> Any:
        def loss(params: Any) -> jax.Array:
            return model.compute_loss(model(IDS, params=params, train=True), labels=IDS)

        return jax.jit(jax.grad(loss))(params)

    plain = gradient()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    jax.tree.map(lambda a, b: assert_close("flax: remat", a, b, 1e-6), gradient(), plain)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.module.remat


# ---------------------------------------------------------------------------- imports


def test_loading_and_calling_imports_no_other_framework(tmp_path: Path) -> None:
    flax_model(NAME).save_pretrained(tmp_path)
    code = (
        "import sys, monoblock, numpy as np\n"
        f"model = monoblock.FlaxAutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "model(np.ones((1, 3), int))\n"
        "print(sorted({'torch', 'tensorflow', 'keras', 'transformers', 'h5py'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
