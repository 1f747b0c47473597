"""Multi-process JAX: a mesh over two processes with two devices each, for tests/flax/test_flax_processes.py.

    python flax_multiprocess.py NUMBER PORT FOLDER SECONDS

NUMBER is the process (0 or 1), FOLDER/start a checkpoint. Each process writes FOLDER/NUMBER.npz and exits after at most
SECONDS.
"""

from __future__ import annotations

import faulthandler
import os
import sys

import xla_test_flags

if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[4]), exit=True)
    os.environ["XLA_FLAGS"] = xla_test_flags.flags("--xla_force_host_platform_device_count=2")

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax_tiny import batch
from jax.sharding import AxisType, Mesh

from monoblock import FlaxAutoModelForCausalLM
from monoblock.backends.flax.loading import flat
from monoblock.backends.flax.processes import on_host
from monoblock.errors import CheckpointError

RATE = 0.1
OPTIMIZER = optax.sgd(RATE, momentum=0.9)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
SAMPLED = GREEDY | {"do_sample": True, "seed": 7}


def step(model: Any) -> Any:
    """A jitted training step: loss, updated parameters and optimizer state."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        def loss(params: Any) -> Any:
            return model.compute_loss(model(**inputs, params=params), labels=inputs["input_ids"])

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = OPTIMIZER.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return jax.jit(run)


def mesh(across: str, kind: Any = AxisType.Auto) -> Mesh:
    """A 2 x 2 mesh whose axis `across` spans both processes."""
    devices = np.array(jax.devices()).reshape(2, 2)  # one process per row
    return Mesh(devices if across == "data" else devices.T, ("data", "tensor"), axis_types=(kind,) * 2)


def gathered(tree: Any) -> dict[str, Any]:
    return {"/".join(path): on_host(leaf) for path, leaf in flat(tree).items()}


def main(number: int, port: str, folder: Path) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, initialization_timeout=60)
    found: dict[str, Any] = {}
    tensor_mesh = mesh("tensor")
    model, params = FlaxAutoModelForCausalLM.from_pretrained(
        folder / "start", mesh=tensor_mesh, _do_init=False
    )
    for path, leaf in flat(params).items():
        found["held/" + "/".join(path)] = [shard.data.shape for shard in leaf.addressable_shards]
    inputs = model.shard_batch(batch(), tensor_mesh)
    found["logits"] = on_host(model(**inputs, params=params).logits)
    found["loss"], params, state = step(model)(params, OPTIMIZER.init(params), inputs)
    found |= {f"params/{name}": x for name, x in gathered(params).items()}
    found |= {f"momentum/{name}": x for name, x in gathered(state[0].trace).items()}
    found["greedy"] = model.generate(**inputs, params=params, **GREEDY).sequences
    found["sampled"] = model.generate(**inputs, params=params, **SAMPLED).sequences
    found["stepwise"] = model.generate(**inputs, params=params, trace=False, **GREEDY).sequences
    model.save_pretrained(folder / "saved", params=params)
    whole = model.hub_state_dict(params)
    found["files"] = sorted(path.name for path in (folder / "saved").iterdir())
    try:
        model.save_pretrained(folder / "failed", params=params, max_shard_size="large")
    except (CheckpointError, ValueError) as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    local = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor"))  # of process 0
    try:
        model.save_pretrained(
            folder / "local", params=model.shard_params(local, model.params_from_hub(whole))
        )
    except ValueError as error:
        found["local"] = str(error)
    # Checkpoints are restored onto the same mesh, and onto the transposed one with explicit axes.
    other = mesh("data", AxisType.Explicit)
    with ocp.StandardCheckpointer() as states:
        states.save(folder / "states", params)
        states.wait_until_finished()
        for name, target in (("same", tensor_mesh), ("other", other)):
            shapes = jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                model.params_shape_tree,
                model.param_shardings(target),
            )
            restored = states.restore(folder / "states", shapes)
            found |= {f"{name}/{path}": x for path, x in gathered(restored).items()}
    found["after"] = on_host(model(**model.shard_batch(batch(), other), params=restored).logits)
    np.savez(folder / f"{number}.npz", **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
