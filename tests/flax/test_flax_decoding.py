"""Inputs and outputs of `generate` on JAX: the contract; outputs of transformers' Flax classes, custom processors."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.decoding import NAME, OPTIONS, VARIED, DecodingContract, of
from contract.models import Pair, ids_of, tokens

from monoblock import GenerationConfig
from monoblock.backends.flax import passes


class TestDecoding(DecodingContract):
    prefix = "Flax"
    output = "GenerateDecoderOnlyOutput"
    reasons: ClassVar = {
        "cache_implementation": "the caches of the JAX classes are 'dynamic' and 'static'",
        "compile_config": "jax.jit compiles the loop over tokens, or with trace=False each step",
        "synced_gpus": "processes that share parameters make the same calls",
    }
    invalid: ClassVar = [
        (
            {"prng_key": jax.random.PRNGKey(0), "seed": 1},
            "generate() got prng_key and seed: give one of them",
        )
    ]

    @pytest.fixture
    def chunk_sizes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        sizes: list[int] = []
        more = passes.extend

        def counted(network: Any, params: Any, given: Any, cache: Any, wanted: Any) -> Any:
            sizes.append(given["input_ids"].shape[1])
            return more(network, params, given, cache, wanted)

        counted.program = more
        monkeypatch.setattr(passes, "extend", counted)
        monkeypatch.setattr(passes, "prefill", None)
        return sizes

    def programs(self, model: Any) -> Any:
        return passes.extend.program._cache_size(), passes.run_loop._cache_size()

    def test_calls_of_transformers_flax_classes(self, pair: Pair) -> None:
        model, ids = pair(NAME)[1], ids_of(2, 7)
        old = model.generate(
            jnp.asarray(ids), max_length=15, pad_token_id=3, prng_key=jax.random.PRNGKey(0), trace=True
        )
        assert isinstance(old.sequences, jax.Array)
        assert old.sequences.dtype == jnp.int32
        assert old.scores is None
        assert [*old] == ["sequences"]
        config = GenerationConfig(max_new_tokens=8, pad_token_id=3, do_sample=False)
        encoding = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        calls = {
            "config": model.generate(ids, config).sequences,
            "a tokenizer's output": model.generate(encoding, config).sequences,
            "lists": model.generate(input_ids=ids.tolist(), generation_config=config).sequences,
            "no trace": model.generate(ids, config, trace=False).sequences,
            "ids alone": model.generate(ids, config, return_dict_in_generate=False),
        }
        for form, found in calls.items():
            assert found.tolist() == old.sequences.tolist(), form
        assert isinstance(calls["ids alone"], jax.Array)

    def test_params_argument(self, pair: Pair) -> None:
        theirs, model = pair(NAME)
        bare = type(model)(model.config, _do_init=False)
        found = tokens(bare, of(ids_of(1, 7)), params=model.params, **VARIED)
        assert found == tokens(theirs, of(ids_of(1, 7)), **VARIED)

    def test_custom_processors_and_criteria_get_jax_arrays(self, pair: Pair) -> None:
        def ban(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
            return scores.at[:, input_ids[0, -1]].set(-jnp.inf)

        def enough(input_ids: jax.Array, scores: Any) -> jax.Array:
            assert scores is None
            return jnp.full(input_ids.shape[0], input_ids.shape[1] >= 11)

        custom: dict[str, Any] = {"logits_processor": [ban], "stopping_criteria": [enough]}
        found = pair(NAME)[1].generate(ids_of(1, 7), **custom, **OPTIONS).sequences
        assert found.shape == (1, 11)
        assert (np.diff(np.asarray(found)[0, 6:]) != 0).all()
