"""Sharded JAX models on eight devices, compared with one device. Runs in its own process and prints JSON.

python flax_sharded.py FOLDER     "families": each one on a 2 x 4 mesh with explicit axes; "meshes": other meshes;
                                  FOLDER is for a checkpoint
"""

from __future__ import annotations

import functools
import json
import os
import sys

import xla_test_flags

os.environ["XLA_FLAGS"] = xla_test_flags.flags("--xla_force_host_platform_device_count=8")

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax_tiny import MODELS, batch, tiny
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "tensor")
GENERATED = ("FlaxOpenAIGPTLMHeadModel",)  # 4 s for each class


def largest(ours: Any, theirs: Any) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def loss_and_gradients(model: Any, shardings: Any = None) -> Any:
    """A jitted function that returns ((loss, logits), gradients), the gradients with these shardings."""

    def loss(params: Any, inputs: Any) -> Any:
        out = model(**inputs, params=params)
        return model.compute_loss(out, labels=inputs["input_ids"]), out.logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, shardings))


def inputs_of(name: str) -> dict[str, np.ndarray]:
    return batch(padded=name != "FlaxFuyuForCausalLM")


@functools.cache
def on_one_device(name: str) -> tuple[Any, Any]:
    """Logits and gradients."""
    model = tiny(name, shallow=True)
    (_, logits), gradients = loss_and_gradients(model)(model.params, inputs_of(name))
    return logits, gradients


def shapes(tree: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Leaf -> its shape, and that of its shard on one device."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            list(leaf.shape),
            list(leaf.addressable_shards[0].data.shape),
        )
        for path, leaf in leaves
    }


def compared(name: str) -> dict[str, Any]:
    model, mesh = tiny(name, shallow=True), jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Explicit,) * 2)
    inputs, (logits, gradients) = inputs_of(name), on_one_device(name)
    step = loss_and_gradients(model, model.param_shardings(mesh))
    sharded, rows = model.shard_params(mesh), model.shard_batch(inputs, mesh)
    (_, ours), split = step(sharded, rows)
    found = {
        "logits": largest(ours, logits),
        "gradients": largest(split, gradients),
        "shapes": shapes(sharded),
        "gradient_shapes": shapes(split),
        "rows": list(ours.addressable_shards[0].data.shape),
    }
    if name in GENERATED:
        greedy: Any = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        expected = model.generate(**inputs, **greedy)
        model.shard(mesh)
        found["tokens"] = bool((model.generate(**inputs, **greedy).sequences == expected.sequences).all())
    return found


def mapped() -> dict[str, float]:
    """`shard_map` over the data axis: rows are sharded, parameters replicated, gradients averaged."""
    model, mesh = tiny("FlaxMistralForCausalLM"), Mesh(np.array(jax.devices()[:4]), ("data",))
    inputs = batch(padded=False)

    def loss(params: Any, inputs: Any) -> Any:
        return model.compute_loss(model(**inputs, params=params), labels=inputs["input_ids"])

    def step(params: Any, inputs: Any) -> Any:
        found = jax.value_and_grad(loss)(params, inputs)
        return jax.lax.pmean(found, "data")

    # With check_vma, gradients of replicated parameters are summed already.
    split = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    value, gradients = jax.jit(split)(model.params, inputs)
    expected, whole = jax.jit(jax.value_and_grad(loss))(model.params, inputs)
    return {"loss": largest(value, expected), "gradients": largest(gradients, whole)}


def fully_sharded(name: str, kind: AxisType) -> dict[str, Any]:
    """A training step on 2 x 2 x 2 devices with parameters sharded by FSDP in addition to tensor parallelism."""
    model, inputs, rate = tiny(name, shallow=True), inputs_of(name), 0.1
    optimizer = optax.sgd(rate, momentum=0.9)

    @jax.jit
    def step(params: Any, state: Any, inputs: Any) -> Any:
        def loss(params: Any) -> Any:
            out = model(**inputs, params=params, output_hidden_states=True)
            return model.compute_loss(out, labels=inputs["input_ids"]), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return out.logits, out.hidden_states[1], optax.apply_updates(params, updates), state

    logits, gradients = on_one_device(name)
    after = jax.tree.map(lambda x, g: np.asarray(x) - rate * np.asarray(g), model.params, gradients)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    params = model.shard_params(mesh, fsdp_axis="fsdp")
    initial = optimizer.init(params)
    rows = model.shard_batch(inputs, mesh, fsdp_axis="fsdp")
    ours, hidden, new_params, new_state = step(params, initial, rows)
    return {
        "logits": largest(ours, logits),
        "gradients": largest(new_state[0].trace, gradients),  # the first momentum
        "parameters": largest(new_params, after),
        "shapes": shapes(params),
        "first_moments": shapes(initial[0].trace),
        "hidden": list(hidden.addressable_shards[0].data.shape),
    }


def several_axes() -> dict[str, Any]:
    """Rows sharded over two mesh axes, and parameters over two axes of another mesh."""
    model, inputs = tiny("FlaxMistralForCausalLM", shallow=True), batch()
    expected = model(**inputs).logits
    kinds = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("replica", "data", "tensor"), axis_types=kinds)
    rows = model.shard_batch(inputs, mesh, data_axis=("replica", "data"))
    by_rows = model(**rows, params=model.shard_params(mesh)).logits
    mesh = jax.make_mesh((2, 2, 2), ("data", "x", "y"), axis_types=kinds)
    params = model.shard_params(mesh, tensor_axis=("x", "y"))
    by_outputs = model(**model.shard_batch(inputs, mesh), params=params).logits
    return {
        "logits": max(largest(by_rows, expected), largest(by_outputs, expected)),
        "rows": list(rows["input_ids"].addressable_shards[0].data.shape),
        "shapes": shapes(params),
    }


def context_mesh() -> dict[str, Any]:
    """Explicit axes of the context's mesh: eager calls, `jit`, `grad`, generation, and a manual decoding loop."""
    model, inputs = tiny("FlaxMistralForCausalLM", shallow=True), batch()
    greedy: Any = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    params = model.params
    logits, tokens = model(**inputs).logits, model.generate(**inputs, **greedy).sequences

    def loss(params: Any, inputs: Any) -> Any:
        out = model(**inputs, params=params)
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        return model.compute_loss(out, labels=jnp.where(mask == 1, ids, -100)), out.logits

    gradients, _ = jax.jit(jax.grad(loss, has_aux=True))(params, inputs)
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params, rows = model.shard_params(mesh, params), model.shard_batch(inputs, mesh)
        ours, split = jax.jit(jax.grad(loss, has_aux=True))(params, rows)[::-1]
        applied = model.module.apply({"params": params}, rows["input_ids"], rows["attention_mask"]).logits
        inside = jax.jit(lambda params, rows: model.generate(**rows, params=params, **greedy).sequences)
        given, made = model.prepare_inputs_for_generation(rows["input_ids"], 19, rows["attention_mask"]), []
        out = model(rows["input_ids"], params=params, **given)
        for _ in range(4):
            made.append(out.logits[:, -1:].argmax(-1))
            given = model.update_inputs_for_generation(out, given)
            out = model(made[-1], params=params, **given)
        return {
            "logits": max(largest(ours, logits), largest(applied, logits)),
            "gradients": largest(split, gradients),
            "type": str(jax.typeof(ours)),
            "gradient_types": [str(jax.typeof(x)) for x in jax.tree.leaves(split)],
            "parameter_types": [str(jax.typeof(x)) for x in jax.tree.leaves(params)],
            "tokens": bool((np.asarray(inside(params, rows)) == np.asarray(tokens)).all()),
            "looped": bool((np.concatenate(made, 1) == np.asarray(tokens)[:, 14:18]).all()),
        }


class ReadLog:
    """An array on the host that records the sizes of its slices that are read."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.shape, self.dtype, self.read = x, x.shape, x.dtype, []

    def __getitem__(self, index: Any) -> np.ndarray:
        self.read.append(self.x[index].size)
        return self.x[index]


def loaded(folder: str) -> dict[str, Any]:
    """Loads a checkpoint onto a mesh, shard by shard."""
    from monoblock.backends.flax.placement import from_host

    model = tiny("FlaxGPTNeoForCausalLM", shallow=True)
    model.save_pretrained(folder)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    again = type(model).from_pretrained(folder, mesh=mesh, fsdp_axis="fsdp")
    shardings = model.param_shardings(mesh, fsdp_axis="fsdp")
    placed = jax.tree.map(lambda x, sharding: x.sharding == sharding, again.params, shardings)
    array = ReadLog(np.arange(64.0).reshape(8, 8))
    from_host(array, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    headed = tiny("FlaxGPTNeoForSequenceClassification", shallow=True, num_labels=4)
    head = type(headed).from_pretrained(folder, mesh=mesh, tensor_axis=None, num_labels=4).params["score"]
    return {
        "equal": largest(again.params, model.params) == 0,
        "placed": all(jax.tree.leaves(placed)),
        "read": array.read,
        "head": head["kernel"].sharding.device_set == set(mesh.devices.flat),
    }


def meshes(folder: str) -> dict[str, Any]:
    kinds = {
        "FlaxMistralForCausalLM": AxisType.Explicit,
        "FlaxMptForCausalLM": AxisType.Auto,
        "FlaxGPTNeoForCausalLM": AxisType.Auto,
    }
    return {name: fully_sharded(name, kind) for name, kind in kinds.items()} | {
        "several": several_axes(),
        "context": context_mesh(),
        "loaded": loaded(folder),
    }


if __name__ == "__main__":
    families = {name: compared(name) for name in MODELS} | {"shard_map": mapped()}
    print(json.dumps({"families": families, "meshes": meshes(sys.argv[1])}), file=sys.stdout)
