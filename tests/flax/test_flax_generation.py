"""Generation on JAX: the contract; compiled programs, PRNG keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from contract.generation import BEAMS, MISTRAL, OPTIONS, GenerationContract, prompts
from contract.models import Pair, ids_of, numpy, tokens

from monoblock.backends.flax import passes


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that JAX compiles inside."""
    found: list[str] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()).startswith("Compiling"):
                found.append(message.split()[1])

    logger, reader = logging.getLogger("jax"), Reader()
    logger.addHandler(reader)
    propagates, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(reader)
        logger.propagate = propagates


class TestGeneration(GenerationContract):
    prefix = "Flax"

    @contextmanager
    def no_new_programs(self, model: Any) -> Iterator[None]:
        with compilations() as found:
            yield
        assert found == []

    def test_models_of_the_same_shapes_share_programs(self, pair: Pair) -> None:
        _, model = pair(MISTRAL)
        options = {**OPTIONS, "max_new_tokens": 9}
        first = model.generate(ids_of(1, 17), **options).sequences
        other = type(model)(model.config, seed=3)
        before = passes.run_loop._cache_size(), passes.prefill._cache_size()
        assert other.generate(ids_of(1, 17), **options).sequences.tolist() != first.tolist()
        found = model.generate(ids_of(1, 17), params=other.params, **options).sequences
        assert found.tolist() != first.tolist()
        assert (passes.run_loop._cache_size(), passes.prefill._cache_size()) == before

    def test_prng_keys_are_seeds(self, pair: Pair) -> None:
        _, model = pair(MISTRAL)

        def drawn(**more: Any) -> list[list[int]]:
            return tokens(model, prompts(), **{**OPTIONS, "max_new_tokens": 8, "do_sample": True, **more})

        assert drawn(seed=7) == drawn(prng_key=jax.random.PRNGKey(7))
        assert drawn() == drawn(prng_key=jax.random.PRNGKey(0)), "the default of transformers' Flax classes"

    def test_scores_of_beams_in_the_default_output(self, pair: Pair) -> None:
        """As `scores`, the field of transformers' Flax classes."""
        theirs, ours = pair(MISTRAL)
        options = {**OPTIONS, **BEAMS}
        expected = theirs.generate(**prompts(), **options, return_dict_in_generate=True, output_scores=True)
        found = ours.generate(**numpy(prompts()), **options)
        np.testing.assert_allclose(found.scores, expected.sequences_scores, atol=1e-5)
