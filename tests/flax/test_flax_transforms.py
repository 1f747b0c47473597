"""JAX's transformations in every family: jit, vmap over rows and parameters, grad, checkpointing, forward-mode
derivatives, pmap, and dropout as a function of its key."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_tiny import MODELS, batch, tiny
from measure import assert_close

GRADIENTS = 1e-6  # fp32, gradients of about 1, a different order of summation: measured 6e-8

# The dropout fields of each family.
DROPOUTS: dict[str, dict[str, Any]] = {
    "FlaxMptForCausalLM": {"resid_pdrop": 0.4, "emb_pdrop": 0.4, "attn_config": {"attn_pdrop": 0.4}},
    "FlaxMistralForCausalLM": {"attention_dropout": 0.4},
    "FlaxFuyuForCausalLM": {"attention_dropout": 0.4, "hidden_dropout": 0.4},
    "FlaxOpenAIGPTLMHeadModel": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
    "FlaxGPTNeoForCausalLM": {"embed_dropout": 0.4, "resid_dropout": 0.4, "attention_dropout": 0.4},
    "FlaxMPNetForMaskedLM": {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4},
}


def loss(model: Any, params: Any, ids: Any, key: Any = None, **inputs: Any) -> Any:
    """The loss with the ids as labels; in training mode if there is a key."""
    out = model(ids, params=params, dropout_rng=key, train=key is not None, **inputs)
    return model.compute_loss(out, labels=ids)


def assert_trees(what: str, ours: Any, theirs: Any, bound: float = GRADIENTS) -> None:
    jax.tree.map(lambda a, b: assert_close(what, a, b, bound), ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_of_grad_over_rows(name: str) -> None:
    """`jit` of `vmap` of `grad`: the mean over rows of equal length is the gradient of the whole batch."""
    model, ids = tiny(name, shallow=True), batch(padded=False)["input_ids"]
    by_row = jax.jit(jax.vmap(jax.value_and_grad(lambda p, row: loss(model, p, row[None])), (None, 0)))
    values, gradients = by_row(model.params, ids)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(model, p, ids)))(model.params)
    assert values.shape == (len(ids),)
    assert_close(f"{name}: vmap, loss", values.mean(), value, 1e-5)
    assert_trees(f"{name}: vmap of grad", jax.tree.map(lambda g: g.mean(0), gradients), gradient)
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_with_dropout(name: str) -> None:
    """The backward pass draws the same dropout masks, for padded inputs too."""
    ids, mask = batch().values()
    model, key, found = tiny(name, shallow=True, **DROPOUTS[name]), jax.random.key(3), []
    for _ in range(2):
        step = jax.jit(jax.grad(lambda p: loss(model, p, ids, key, attention_mask=mask)))
        found.append(step(model.params))
        model.enable_gradient_checkpointing()
    assert_trees(f"{name}: remat", found[1], found[0], 1e-6)


def test_checkpoint_around_a_call() -> None:
    model, inputs = tiny("FlaxMistralForCausalLM", shallow=True), batch()

    def step(params: Any) -> Any:
        return loss(model, params, inputs["input_ids"], attention_mask=inputs["attention_mask"])

    saved = jax.checkpoint(step, policy=jax.checkpoint_policies.nothing_saveable)
    assert_trees(
        "checkpoint", jax.jit(jax.grad(saved))(model.params), jax.jit(jax.grad(step))(model.params), 1e-6
    )


def test_vmap_over_parameters() -> None:
    """Several models of the same shapes in one call."""
    models = [tiny("FlaxGPTNeoForCausalLM", seed, shallow=True) for seed in range(3)]
    ids = batch(padded=False)["input_ids"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(model.params for model in models))
    logits = jax.jit(jax.vmap(lambda params: models[0](ids, params=params).logits))(stacked)
    expected = np.stack([model(ids).logits for model in models])
    assert_close("vmap over parameters", logits, expected, 1e-5)


def test_forward_mode_agrees_with_reverse_mode() -> None:
    model, ids = tiny("FlaxMptForCausalLM", shallow=True), batch(padded=False)["input_ids"]
    direction = jax.tree.map(
        lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), model.params
    )
    step = lambda params: loss(model, params, ids)  # noqa: E731
    _, forward = jax.jit(lambda *given: jax.jvp(step, given[:1], given[1:]))(model.params, direction)
    products = jax.tree.map(np.vdot, jax.jit(jax.grad(step))(model.params), direction)
    assert_close("jvp", forward, sum(jax.tree.leaves(products)), 1e-4)  # a sum of 20,000 products


def test_pmap() -> None:
    """The older API for several devices, which transformers' documentation names."""
    model, ids = tiny("FlaxMistralForCausalLM", shallow=True), batch(padded=False)["input_ids"]
    one = ids[None, :2]  # (devices, rows, tokens)
    logits = jax.pmap(lambda params, rows: model(rows, params=params).logits, in_axes=(None, 0))(
        model.params, one
    )
    assert_close("pmap", logits[0], model(ids[:2]).logits, 1e-5)


# ---------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_a_function_of_its_key(name: str) -> None:
    model, ids = tiny(name, shallow=True, **DROPOUTS[name]), batch(padded=False)["input_ids"]
    one, two = jax.random.split(jax.random.key(0))
    run = jax.jit(lambda key: model(ids, params=model.params, dropout_rng=key, train=True).logits)
    first, again, other = run(one), run(one), run(two)
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-2
    assert float(jnp.abs(first - model(ids).logits).max()) > 1e-2


def test_embedding_dropout_scales_the_kept_entries() -> None:
    """With probability p an entry is 0, else it is 1 / (1 - p) times itself."""
    model, ids = tiny("FlaxGPTNeoForCausalLM", embed_dropout=0.25), batch(padded=False)["input_ids"]
    first = model(ids, output_hidden_states=True).hidden_states[0]
    dropped = model(ids, output_hidden_states=True, train=True, dropout_rng=jax.random.key(1)).hidden_states[
        0
    ]
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped, np.where(kept, first / 0.75, 0), rtol=1e-5)
    # 1792 draws: one standard deviation is 0.0102.
    assert abs(1 - kept.mean() - 0.25) < 0.04


def test_attention_dropout_is_independent_by_row_and_head() -> None:
    model, ids = (
        tiny("FlaxMistralForCausalLM", shallow=True, attention_dropout=0.25),
        batch(padded=False)["input_ids"],
    )
    whole = np.asarray(model(ids, output_attentions=True).attentions[0])
    dropped = np.asarray(
        model(ids, output_attentions=True, train=True, dropout_rng=jax.random.key(1)).attentions[0]
    )
    kept = dropped != 0
    np.testing.assert_allclose(dropped, np.where(kept, whole / 0.75, 0), rtol=1e-5, atol=1e-7)
    visible = whole > 0
    assert abs((visible & ~kept).sum() / visible.sum() - 0.25) < 0.04  # 1,104 weights: a deviation of 0.013
    assert np.unique(kept.sum((-1, -2))).size > 1  # not the same mask for all rows and heads


def test_mean_over_dropout_keys_is_the_deterministic_output() -> None:
    """Where the layers after the dropout are linear."""
    model = tiny("FlaxMptForTokenClassification", num_labels=3, classifier_dropout=0.5)
    ids = batch(padded=False)["input_ids"]
    keys = jax.random.split(jax.random.key(0), 1024)
    draw = jax.vmap(lambda key: model(ids, train=True, dropout_rng=key).logits)
    logits = np.asarray(jax.jit(draw)(keys))
    rest, deviation = np.asarray(model(ids).logits), logits.std(0) / 32
    assert (np.abs(logits.mean(0) - rest) < 5 * deviation).all()  # of 168 means
    assert deviation.min() > 0


def test_training_without_dropout_needs_no_key() -> None:
    model, ids = tiny("FlaxMistralForCausalLM", shallow=True), batch(padded=False)["input_ids"]
    assert_close("train without dropout", model(ids, train=True).logits, model(ids).logits, 1e-6)
