"""Causal language model training in the style of the example scripts for transformers 4's Flax classes, on two devices.

Follows those scripts: a TrainState with a dropout key, a weight decay mask by parameter name, `pmap` over replicated
states, metrics by `pmean`, a checkpoint of the first replica. Runs in its own process:

    python flax_train_script.py FOLDER      saves into FOLDER and prints JSON
"""

from __future__ import annotations

import json
import os
import sys

import xla_test_flags

os.environ["XLA_FLAGS"] = xla_test_flags.flags("--xla_force_host_platform_device_count=2")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils, traverse_util
from flax.training import train_state
from flax.training.common_utils import onehot, shard, shard_prng_key

from monoblock import FLAX_MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, FlaxAutoModelForCausalLM

MODEL_TYPES = tuple(config.model_type for config in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING)
FIELDS: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["local"], 1]],
        "window_size": 6,
        "max_position_embeddings": 32,
    },
    "mistral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
VOCAB, ROWS, TOKENS, STEPS = 64, 8, 16, 6


class TrainState(train_state.TrainState):
    dropout_rng: Any

    def replicate(self) -> TrainState:
        return jax_utils.replicate(self).replace(dropout_rng=shard_prng_key(self.dropout_rng))


def decay_mask_fn(params: Any) -> Any:
    """False for biases and for the parameters of norms."""
    flat = traverse_util.flatten_dict(params)
    norms = {
        path[-2:]
        for name in ("layernorm", "layer_norm", "ln")
        for path in flat
        if name in "".join(path).lower()
    }
    return traverse_util.unflatten_dict({p: p[-1] != "bias" and p[-2:] not in norms for p in flat})


def loss_fn(logits: Any, labels: Any) -> Any:
    shifted = logits[..., :-1, :], onehot(labels[..., 1:], logits.shape[-1])
    return optax.softmax_cross_entropy(*shifted).mean()


def steps(model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def train_step(state: TrainState, batch: Any) -> Any:
        dropout_rng, new_dropout_rng = jax.random.split(state.dropout_rng)

        def compute_loss(params: Any) -> Any:
            labels = batch.pop("labels")
            logits = state.apply_fn(**batch, params=params, dropout_rng=dropout_rng, train=True)[0]
            return loss_fn(logits, labels)

        loss, grad = jax.value_and_grad(compute_loss)(state.params)
        new_state = state.apply_gradients(grads=jax.lax.pmean(grad, "batch"), dropout_rng=new_dropout_rng)
        return new_state, jax.lax.pmean({"loss": loss}, axis_name="batch")

    def eval_step(params: Any, batch: Any) -> Any:
        labels = batch.pop("labels")
        logits = model(**batch, params=params, train=False)[0]
        return jax.lax.pmean({"loss": loss_fn(logits, labels)}, axis_name="batch")

    return train_step, eval_step


def trained(kind: str, folder: str) -> dict[str, Any]:
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, pad_token_id=3, **FIELDS[kind])
    model = FlaxAutoModelForCausalLM.from_config(config, seed=0, dtype=jnp.float32)
    mask = decay_mask_fn(model.params)
    adamw = optax.adamw(learning_rate=1e-2, weight_decay=0.1, mask=decay_mask_fn)
    state = TrainState.create(
        apply_fn=model.__call__, params=model.params, tx=adamw, dropout_rng=jax.random.PRNGKey(1)
    ).replicate()
    train_step, eval_step = steps(model)
    p_train_step = jax.pmap(train_step, "batch", donate_argnums=(0,))
    p_eval_step = jax.pmap(eval_step, "batch")
    ids = np.random.default_rng(0).integers(10, VOCAB, (ROWS, TOKENS), np.int32)
    batch = shard({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids})
    losses = []
    for _ in range(STEPS):
        state, metric = p_train_step(state, dict(batch))
        losses.append(float(jax_utils.unreplicate(metric)["loss"]))
    final = jax_utils.unreplicate(p_eval_step(state.params, dict(batch)))
    replicas = [jax.device_get(jax.tree.map(lambda x, i=i: x[i], state.params)) for i in range(2)]
    model.save_pretrained(folder, params=replicas[0])
    again = FlaxAutoModelForCausalLM.from_pretrained(folder)
    whole = loss_fn(again(ids).logits, ids)
    equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), replicas[0], again.params)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *replicas)
    decays = traverse_util.flatten_dict(mask)
    return {
        "decayed": sorted({path[-1] for path, value in decays.items() if value}),
        "not decayed": sorted({"/".join(path[-2:]) for path, value in decays.items() if not value}),
        "losses": losses,
        "eval": float(final["loss"]),
        "saved": float(whole),
        "replicas": jax.tree.all(same),
        "checkpoint": jax.tree.all(equal),
    }


if __name__ == "__main__":
    assert set(FIELDS) <= set(MODEL_TYPES)
    found = {kind: trained(kind, str(Path(sys.argv[1]) / kind)) for kind in FIELDS}
    print(json.dumps(found), file=sys.stdout)
