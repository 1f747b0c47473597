"""Memory bytes_beside weights and cache, from XLA's memory analysis: masks and scores grow neither with
max_position_embeddings nor with the square of the sequence length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import monoblock

MB = 2**20
# The default config, of 131,072 positions, 32 heads and a window of 4,096, with few and narrow layers.
NARROW = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}


@pytest.fixture(autouse=True)
def optimised() -> Iterator[None]:
    """Compile with XLA's optimisations, without which nothing is fused and each operation has a separate buffer.

    The flags of xla_test_flags.py have no effect here: a gradient's 543 MB differ by 192 bytes.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def mistral(**fields: Any) -> Any:
    config = monoblock.MistralConfig(**{**NARROW, **fields})
    assert config.max_position_embeddings == 131072
    assert config.num_attention_heads == 32
    return monoblock.FlaxMistralForCausalLM(config, _do_init=False)


def tokens(count: int) -> Any:
    return jax.ShapeDtypeStruct((1, count), jnp.int32)


def memory_analysis(function: Any, *arguments: Any) -> Any:
    """XLA's memory analysis of a call, without running it."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis()


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_beside(model: Any) -> int:
    """Bytes beyond weights and cache for a prompt of 512 tokens, with a cache and a mask for all positions."""

    def start(params: Any, ids: Any, mask: Any) -> Any:
        cache = model.init_cache(1, model.config.max_position_embeddings)
        out = model(ids, attention_mask=mask, params=params, past_key_values=cache, logits_to_keep=1)
        return out.logits, out.past_key_values

    arguments = (model.params_shape_tree, tokens(512), tokens(131072))
    plan = memory_analysis(start, *arguments)
    _, cache = jax.eval_shape(start, *arguments)
    assert cache.keys[0].shape[2] == (model.config.sliding_window or 131072)
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - size(cache)


def test_prompt_with_the_default_config() -> None:
    """With the full widths, as the analysis allocates nothing. Layers reuse memory, so two suffice."""
    config = monoblock.MistralConfig(num_hidden_layers=2)
    model = monoblock.FlaxMistralForCausalLM(config, _do_init=False)
    assert bytes_beside(model) < 100 * MB  # measured 92 MB, most of it the activations of the MLP


@pytest.mark.parametrize("window", [4096, None])
def test_prompt_takes_no_memory_for_unused_positions(window: int | None) -> None:
    assert bytes_beside(mistral(sliding_window=window)) < 60 * MB  # measured 29 MB


def test_tokens_after_a_long_cache() -> None:
    """512 queries over 131,072 cached positions of 32 heads would be 8.6 GB of scores; a query block is bounded."""
    model = mistral(sliding_window=None, num_hidden_layers=1)
    cache = jax.eval_shape(lambda: model.init_cache(1, model.config.max_position_embeddings))

    def more(params: Any, ids: Any, mask: Any, cache: Any) -> Any:
        out = model(ids, attention_mask=mask, params=params, past_key_values=cache, logits_to_keep=1)
        return out.logits, out.past_key_values

    plan = memory_analysis(more, model.params_shape_tree, tokens(512), tokens(131072), cache)
    assert plan.temp_size_in_bytes - size(cache) < 600 * MB


def test_decoding_step_with_a_cache_of_all_positions() -> None:
    model = mistral()
    cache = jax.eval_shape(lambda: model.init_cache(1, model.config.max_position_embeddings))

    def step(params: Any, cache: Any, token: Any, mask: Any) -> Any:
        return model(token, attention_mask=mask, params=params, past_key_values=cache).logits

    plan = memory_analysis(step, model.params_shape_tree, cache, tokens(1), tokens(131072))
    assert plan.temp_size_in_bytes < 16 * MB  # measured 4 MB


@pytest.mark.parametrize("window", [4096, None])
def test_memory_grows_linearly_with_tokens(window: int | None) -> None:
    """Twice the tokens take at most twice the memory, and never heads x tokens x tokens."""
    model, plans = mistral(sliding_window=window), {}
    for count in (8192, 16384):
        plan = memory_analysis(
            lambda params, ids: model(ids, params=params, logits_to_keep=1).logits,
            model.params_shape_tree,
            tokens(count),
        )
        plans[count] = plan.temp_size_in_bytes
        square = 32 * count * count * 4
        assert plans[count] < square / 8
    # A window's keys do not grow; hidden states do.
    assert plans[16384] < plans[8192] * (1.3 if window else 2.2)


def test_gradients_of_long_inputs_keep_no_scores() -> None:
    model, count = mistral(), 8192

    def loss(params: Any, ids: Any) -> Any:
        return model.compute_loss(model(ids, params=params), labels=ids)

    plan = memory_analysis(jax.grad(loss), model.params_shape_tree, tokens(count))
    assert plan.temp_size_in_bytes < 32 * count * count * 4 / 8
