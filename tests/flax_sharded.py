"""Run in a process of its own, which has eight devices: each family on a 2 x 4 mesh beside one device. Prints JSON."""

from __future__ import annotations

import json
import os
import sys

import quick_xla

os.environ["XLA_FLAGS"] = quick_xla.flags("--xla_force_host_platform_device_count=8")

from typing import Any

import jax
import numpy as np
from flax_tiny import MODELS, batch, tiny
from jax.sharding import Mesh, PartitionSpec

AXES = ("data", "tensor")
GENERATED = ("FlaxMistralForCausalLM", "FlaxOpenAIGPTLMHeadModel")  # every further one costs 4 s


def largest(ours: Any, theirs: Any) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def losses(model: Any, places: Any = None) -> Any:
    """Logits and gradients, which are to lie at these places, compiled; the labels are the ids."""

    def loss(params: Any, inputs: Any) -> Any:
        out = model(**inputs, params=params)
        return model.compute_loss(out, labels=inputs["input_ids"]), out.logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, places))


def shapes(tree: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Leaf -> its shape, and that of what lies on one device."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            list(leaf.shape),
            list(leaf.addressable_shards[0].data.shape),
        )
        for path, leaf in leaves
    }


def compared(name: str) -> dict[str, Any]:
    model, mesh = tiny(name, shallow=True), jax.make_mesh((2, 4), AXES)
    inputs = batch(padded=name != "FlaxFuyuForCausalLM")
    params, step = model.params, losses(model)
    (_, logits), gradients = step(params, inputs)
    step = losses(model, model.param_shardings(mesh))
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
    """`shard_map` over the data: each device has its own rows, all parameters, and a mean of the gradients."""
    model, mesh = tiny("FlaxMistralForCausalLM"), Mesh(np.array(jax.devices()[:4]), ("data",))
    inputs = batch(padded=False)

    def loss(params: Any, inputs: Any) -> Any:
        return model.compute_loss(model(**inputs, params=params), labels=inputs["input_ids"])

    def step(params: Any, inputs: Any) -> Any:
        found = jax.value_and_grad(loss)(params, inputs)
        return jax.lax.pmean(found, "data")

    # With check_vma, gradients of parameters that all devices share come summed already.
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


if __name__ == "__main__":
    print(json.dumps({name: compared(name) for name in MODELS} | {"shard_map": mapped()}), file=sys.stdout)
