"""Code written for transformers 4's Flax classes runs with only the import changed: `module.apply`, custom decoding
loops and processors, partition rules by parameter name, and a training script."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from flax_models import config_of, flax_model, ids_of
from flax_tiny import PAD, batch, tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import assert_close

import monoblock
from monoblock.families import FAMILIES, class_names, family

TESTS = Path(__file__).parents[1]
NAME = "GPTNeoForCausalLM"
ATOL = 1e-5  # fp32, 2 layers, logits of about 10; measured 4e-6


# ---------------------------------------------------------------------------- modules


def arguments() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, mask and positions of a left-padded batch."""
    ids = jnp.asarray(ids_of())
    mask = jnp.ones_like(ids).at[0, :3].set(0)
    return ids, mask, jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)


@pytest.mark.parametrize("name", [NAME, "MistralModel", "MPNetForMaskedLM"])
def test_modules_take_the_arguments_of_transformers_4_in_order(name: str) -> None:
    model, (ids, mask, positions) = flax_model(name), arguments()
    positions = positions + 2 if name.startswith("MPNet") else positions
    expected = model(ids, mask, positions, output_attentions=True, output_hidden_states=True)
    apply = jax.jit(model.module.apply, static_argnums=(4, 5, 6, 7, 8))
    out = apply({"params": model.params}, ids, mask, positions, True, False, True, True, True)
    assert type(out) is type(expected) and list(out) == list(expected)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert_close(f"{name}: apply", a, b, ATOL)
    flat = jax.jit(
        lambda params: model.module.apply(
            {"params": params}, ids, mask, position_ids=positions, deterministic=True, return_dict=False
        )
    )(model.params)
    assert isinstance(flat, tuple) and len(flat) == 1
    assert_close(f"{name}: apply, tuple", flat[0], out[0], ATOL)


def test_module_init_and_dropout() -> None:
    model = monoblock.FlaxGPTNeoForCausalLM(config_of(NAME, embed_dropout=0.5))
    ids, mask, positions = arguments()
    params = model.module.init(jax.random.key(0), ids, mask, positions, return_dict=False)["params"]
    assert jax.tree.structure(params) == jax.tree.structure(model.params)

    def logits(key: int) -> jax.Array:
        rngs = {"dropout": jax.random.key(key)}
        return model.module.apply({"params": params}, ids, mask, positions, False, rngs=rngs).logits

    assert np.array_equal(logits(1), logits(1)) and not np.allclose(logits(1), logits(2))


def test_modules_take_a_cache_and_refuse_cache_collections() -> None:
    model, (ids, _, _) = flax_model(NAME), arguments()
    variables, apply = {"params": model.params}, jax.jit(model.module.apply)
    out = apply(variables, ids[:, :-1], past_key_values=model.init_cache(2, 9))
    last = apply(variables, ids[:, -1:], past_key_values=out.past_key_values)
    assert_close("apply, cache", last.logits, model(ids).logits[:, -1:], ATOL)
    for given, more in (((True, True), {}), ((), {"cache": {"index": jnp.zeros(())}})):
        with pytest.raises(
            ValueError, match=r"not a variable collection: give past_key_values=model.init_cache"
        ):
            model.module.apply({**variables, **more}, ids, None, None, *given)
    with pytest.raises(TypeError, match="attn_mask"):
        model.module.apply(variables, ids, attn_mask=ids)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, tokens\) = \(2, 7\)"):
        model.module.apply(variables, ids, jnp.ones((2, 5)))


@pytest.mark.parametrize("name", [NAME, "FuyuForCausalLM"])
def test_nnx_bridge(name: str) -> None:
    model, (ids, mask, positions) = flax_model(name), arguments()
    made: Any = nnx.bridge.ToNNX(model.module, rngs=nnx.Rngs(0)).lazy_init(ids)
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    own = flatten_dict(model.params)
    assert {path for path, _ in nnx.to_flat_state(params)} == own.keys()
    params = jax.tree.map(nnx.Param, model.params)
    out = nnx.merge(graph, params, rest)(ids, mask, positions)
    assert_close(f"{name}: nnx", out.logits, model(ids, mask, positions).logits, ATOL)


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", [NAME, "MistralForCausalLM", "MptForCausalLM"])
def test_custom_decoding_loop(name: str) -> None:
    model, (ids, mask, _) = flax_model(name), arguments()
    kwargs = model.prepare_inputs_for_generation(ids, 10, attention_mask=mask)
    assert kwargs["attention_mask"].shape == (2, 10) and kwargs["past_key_values"].max_length == 10
    tokens = [ids]
    for _ in range(3):
        out = model(tokens[-1], **kwargs)
        kwargs = model.update_inputs_for_generation(out, kwargs)
        tokens.append(out.logits[:, -1:].argmax(-1))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert np.array_equal(jnp.concatenate(tokens, axis=1), expected.sequences)


class OnlyEven(monoblock.FlaxLogitsProcessor):
    """Masks odd tokens, and at one length all but one; stores the lengths."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Any, scores: Any, cur_len: int) -> Any:
        self.lengths.append(cur_len)
        only = jnp.full_like(scores, -jnp.inf).at[:, 20].set(0)
        return jnp.where(cur_len == 8, only, scores.at[:, 1::2].set(-jnp.inf))


def test_processors_with_cur_len() -> None:
    model, ids = flax_model(NAME), ids_of()
    own, late = OnlyEven(), lambda ids, scores, cur_len: scores
    both = monoblock.FlaxLogitsProcessorList([own, late, lambda ids, scores: scores])
    for given in (both, [both]):
        new = model.generate(
            ids, max_new_tokens=3, do_sample=False, eos_token_id=None, logits_processor=given
        )
        new = np.asarray(new.sequences)[:, 7:]
        assert (new % 2 == 0).all() and (new[:, 1] == 20).all()
    assert own.lengths == [7, 8, 9] * 2
    assert float(both(ids, jnp.zeros((2, 89)), 8)[0].argmax()) == 20
    with pytest.raises(NotImplementedError, match="FlaxLogitsProcessor does not define"):
        monoblock.FlaxLogitsProcessor()(ids, jnp.zeros((2, 89)), 7)


# ---------------------------------------------------------------------------- generate inside a trace

TRACED: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def test_generate_under_jit_pmap_and_vmap() -> None:
    model, (ids, mask) = tiny("FlaxGPTNeoForCausalLM", shallow=True), batch().values()
    expected = np.asarray(model.generate(ids, attention_mask=mask, **TRACED).sequences)

    def generate(params: Any, ids: Any, mask: Any) -> Any:
        return model.generate(ids, attention_mask=mask, params=params, **TRACED).sequences

    assert np.array_equal(jax.jit(generate)(model.params, ids, mask), expected)
    rows = jax.vmap(lambda row, own: generate(model.params, row[None], own[None])[0])(ids, mask)
    assert np.array_equal(rows, expected)
    replicated = jax.tree.map(lambda x: jnp.stack([x]), model.params)
    assert np.array_equal(jax.pmap(generate)(replicated, ids[None], mask[None])[0], expected)
    without = jax.jit(lambda p, ids: model.generate(ids, params=p, **TRACED).sequences)
    assert np.array_equal(without(model.params, ids), expected)  # padding is found by the pad token
    compiled = jax.jit(model.generate, static_argnames=("max_new_tokens", "do_sample", "pad_token_id"))
    found = compiled(ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    assert type(found).__name__ == "FlaxGenerateOutput" and found.sequences.shape == (4, 20)


def test_sampling_and_eos_under_jit() -> None:
    model, (ids, mask) = tiny("FlaxMistralForCausalLM", shallow=True), batch().values()
    sampled = {**TRACED, "do_sample": True, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3}
    key = jax.random.key(3)
    expected = model.generate(ids, attention_mask=mask, prng_key=key, **sampled).sequences
    found = jax.jit(lambda key: model.generate(ids, attention_mask=mask, prng_key=key, **sampled).sequences)(
        key
    )
    assert np.array_equal(found, expected)
    greedy = model.generate(ids, attention_mask=mask, **TRACED).sequences
    options = {**TRACED, "eos_token_id": int(greedy[0, -4])}
    short = np.asarray(model.generate(ids, attention_mask=mask, **options).sequences)
    long = np.asarray(jax.jit(lambda m: model.generate(ids, attention_mask=m, **options).sequences)(mask))
    assert long.shape == (4, 20) and np.array_equal(long[:, : short.shape[1]], short)
    assert (long[:, short.shape[1] :] == PAD).all() and (long[0, -3:] == PAD).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_beams": 2}, "does not support beam search"),
        ({"position_ids": np.zeros((4, 14), int)}, "not position_ids"),
        ({"logits_processor": [lambda ids, scores: scores]}, "need the host between tokens"),
        ({"trace": False}, "need the host between tokens"),
        ({"max_new_tokens": 100}, r"100 new tokens do not fit: .* the prompt takes 14 of them"),
        ({"return_dict_in_generate": True}, "leave out return_dict_in_generate"),
    ],
)
def test_unsupported_options_inside_a_trace_raise(more: dict[str, Any], message: str) -> None:
    model, ids = tiny("FlaxGPTNeoForCausalLM"), batch(padded=False)["input_ids"]
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda ids: model.generate(ids, **{**TRACED, **more}))(ids)


# ---------------------------------------------------------------------------- names


def test_model_mappings_and_base_classes() -> None:
    mapping = monoblock.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING
    kinds = [config.model_type for config in mapping.keys()]  # noqa: SIM118  # as in the scripts
    assert kinds == ["mpt", "mistral", "fuyu", "openai-gpt", "gpt_neo"] and len(mapping) == 5
    assert mapping[monoblock.GPTNeoConfig] is monoblock.FlaxGPTNeoForCausalLM
    assert mapping[monoblock.OpenAIGPTConfig] is monoblock.FlaxOpenAIGPTLMHeadModel
    assert monoblock.MPNetConfig not in mapping and monoblock.MPNetConfig in monoblock.FLAX_MODEL_MAPPING
    with pytest.raises(KeyError):
        mapping[monoblock.MPNetConfig]
    for kind, (stem, _) in FAMILIES.items():
        base = getattr(monoblock, f"Flax{stem}PreTrainedModel")
        assert base.config_class is family(kind).config and issubclass(base, monoblock.FlaxPreTrainedModel)
        assert all(issubclass(getattr(monoblock, "Flax" + name), base) for name in class_names(kind))
    with pytest.raises(
        TypeError, match="FlaxMptPreTrainedModel is only the base of FlaxMptModel, FlaxMptFor"
    ):
        monoblock.FlaxMptPreTrainedModel(config_of("MptModel"))


def test_torch_dtype_raises() -> None:
    with pytest.raises(
        TypeError, match="has no argument 'torch_dtype': use dtype=, the dtype of the computation"
    ):
        monoblock.FlaxGPTNeoModel(config_of("GPTNeoModel"), torch_dtype=jnp.float32)


# The partition rules of a guide to GPT Neo on TPUs: sequences of regular expressions over parameter paths.
RULES: list[tuple[tuple[str, ...], PartitionSpec | None]] = [
    (("transformer", "wpe", "embedding"), PartitionSpec("mp", None)),
    (("transformer", "wte", "embedding"), PartitionSpec("mp", None)),
    (("attention", "(q_proj|k_proj|v_proj)", "kernel"), PartitionSpec(None, "mp")),
    (("attention", "out_proj", "kernel"), PartitionSpec("mp", None)),
    (("attention", "out_proj", "bias"), None),
    (("mlp", "c_fc", "kernel"), PartitionSpec(None, "mp")),
    (("mlp", "c_fc", "bias"), PartitionSpec("mp")),
    (("mlp", "c_proj", "kernel"), PartitionSpec("mp", None)),
    (("mlp", "c_proj", "bias"), None),
    ((r"ln_\d+", "bias"), None),
    ((r"\d+", r"ln_\d+", "scale"), None),
    (("ln_f", "bias"), None),
    (("ln_f", "scale"), None),
]


def matches(rule: tuple[str, ...], path: tuple[str, ...]) -> bool:
    windows = (path[i : i + len(rule)] for i in range(len(path) - len(rule) + 1))
    return any(all(map(re.fullmatch, rule, window)) for window in windows)


def test_partition_rules_match_every_parameter() -> None:
    model = flax_model(NAME)
    found = {
        path: [spec for rule, spec in RULES if matches(rule, path)] for path in flatten_dict(model.params)
    }
    assert [path for path, specs in found.items() if len(specs) != 1] == []
    chosen = {path: specs[0] or PartitionSpec() for path, specs in found.items()}
    mesh = Mesh(np.array(jax.devices()[:1]), ("mp",))
    own = flatten_dict(model.partition_specs(mesh, tensor_axis="mp"))
    # The model's partition specs are the same, except for the position table, which is replicated.
    assert [path for path in own if own[path] != chosen[path]] == [("transformer", "wpe", "embedding")]
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), unflatten_dict(chosen))
    sharded = jax.device_put(model.params, shardings)
    assert_close("sharded by rules", model(ids_of(), params=sharded).logits, model(ids_of()).logits, ATOL)


# ---------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def clm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of the training script on two virtual devices."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(TESTS / "flax_train_script.py"), str(tmp_path_factory.mktemp("clm"))]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["gpt_neo", "mistral"])
def test_training_script(kind: str, clm: dict[str, Any]) -> None:
    found = clm[kind]
    losses = found["losses"]
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert found["eval"] < losses[-1] < losses[0] - 0.5
    assert found["replicas"] and found["checkpoint"]
    assert abs(found["eval"] - found["saved"]) < 1e-5  # fp32, a mean of two means of losses of about 3


def test_weight_decay_mask_excludes_norms_and_biases(clm: dict[str, Any]) -> None:
    assert clm["gpt_neo"]["decayed"] == clm["mistral"]["decayed"] == ["embedding", "kernel"]
    names = {"ln_1/scale", "ln_1/bias", "ln_2/scale", "ln_2/bias", "ln_f/scale", "ln_f/bias", "c_fc/bias"}
    assert names <= set(clm["gpt_neo"]["not decayed"])
    assert {"input_layernorm/weight", "post_attention_layernorm/weight"} <= set(clm["mistral"]["not decayed"])
