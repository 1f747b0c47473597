"""Generation on TensorFlow: the contract in graphs, eagerly and with XLA; array operations, traces, generators, and
`generate` inside a `tf.function`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import array_calls
import numpy as np
import pytest
import tensorflow as tf
import v4_checkpoints
from contract.generation import (
    BEAMS,
    EAGER,
    GPT_NEO,
    MISTRAL,
    MPT,
    NEW,
    OPTIONS,
    SAMPLED,
    VARIED,
    GenerationContract,
    prompts,
)
from contract.models import Pair, ids_of, numpy, tokens
from tiny_families import VOCAB

import monoblock
from monoblock.backends.tf.arrays import TfOps, largest
from monoblock.backends.tf.passes import passes_of
from monoblock.generation.arrays import NumpyOps

# Tests make many small graphs one after the other, of which TensorFlow warns.
tf.get_logger().setLevel("ERROR")

XLA: dict[str, Any] = {}
GRAPH: dict[str, Any] = {"jit_compile": False}
# XLA takes seconds per model: two models use it, and the others the cheaper modes.
MODES = {MPT: GRAPH, MISTRAL: XLA, GPT_NEO: XLA, "FuyuForCausalLM": EAGER, "OpenAIGPTLMHeadModel": GRAPH}


# ---------------------------------------------------------------------------- operations


def _converted(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return tf.constant(value)
    return [_converted(item) for item in value] if isinstance(value, list) else value


def test_array_operations_equal_numpys_eagerly_and_in_a_graph() -> None:
    ours, reference = TfOps(), NumpyOps()
    calls = [call for call in array_calls.CALLS if call[0] not in ("array", "mask")]

    def run() -> list[Any]:
        return [getattr(ours, name)(*(_converted(x) for x in arguments)) for name, *arguments in calls]

    for found in (run(), tf.function(run, autograph=False)()):
        for (name, *arguments), result in zip(calls, found, strict=True):
            expected = getattr(reference, name)(*arguments)
            pairs = (
                zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
            )
            for mine, theirs in pairs:
                # float32 sums of 40 terms in another order
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6, err_msg=name)


def test_top_k_of_long_rows() -> None:
    """The top k are found by blocks; of equal values the first is taken, as in NumPy's."""
    generator = np.random.default_rng(0)
    for rows, count, k, distinct in (
        (2, 5000, 7, 9),
        (1, 5000, 50, 10**6),
        (3, 1001, 1, 4),
        (2, 640, 640, 50),
    ):
        x = generator.integers(0, distinct, (rows, count)).astype(np.float32)
        x[0, : count // 2] = -np.inf
        values, index = largest(tf.constant(x), k)
        expected, indices = NumpyOps().top_k(x, k)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(index, indices)


@pytest.mark.parametrize("name", [name for name in v4_checkpoints.TENSORFLOW if v4_checkpoints.prompt(name)])
def test_stored_tokens_of_transformers_tf_classes(name: str) -> None:
    found = v4_checkpoints.prompt(name)
    assert found is not None
    ids, expected = found
    model = getattr(monoblock, name).from_pretrained(v4_checkpoints.FOLDER / name)
    assert (
        model.generate(ids, max_new_tokens=12, do_sample=False, **EAGER).numpy().tolist() == expected.tolist()
    )


class TestGeneration(GenerationContract):
    prefix = "TF"
    graph = GRAPH
    modes: ClassVar = MODES

    @contextmanager
    def no_new_programs(self, model: Any) -> Iterator[None]:
        before = passes_of(model, compiled=False).traces()
        yield
        assert passes_of(model, compiled=False).traces() == before

    def test_xla_compiles_a_step_once(self, pair: Pair) -> None:
        """And not again for each length of the cache, as a slice in the step would cause."""
        _, model = pair(GPT_NEO)
        ids = ids_of(1, 23)
        options = {**OPTIONS, "logits_processor": [lambda ids, scores: scores]}

        def seconds(length: int, new: int) -> float:
            before = time.process_time()
            model.generate(ids[:, :length], **{**options, "max_new_tokens": new})
            return time.process_time() - before

        compiling = seconds(17, 2)
        # Ten more lengths take hundredths of a second, or ten compilations if each length were compiled.
        assert seconds(18, 12) < compiling / 2

    def test_new_weights_need_no_trace_and_new_variables_do(self, pair: Pair) -> None:
        model, ids = pair(MISTRAL, num_hidden_layers=1)[1], [[10, 11, 12]]
        options = {**OPTIONS, "max_new_tokens": 4, **GRAPH}
        first = model.generate(ids, **options).numpy().tolist()
        traces = passes_of(model, compiled=False).traces()
        for variable in model.trainable_variables:
            variable.assign(variable * -0.7)
        other = model.generate(ids, **options).numpy().tolist()
        assert other != first
        assert passes_of(model, compiled=False).traces() == traces
        model.resize_token_embeddings(VOCAB + 3)
        assert model.generate([[VOCAB + 1]], **options).shape == (1, 5)

    def test_functions_run_eagerly(self, pair: Pair) -> None:
        """TensorFlow's debugging switch applies to `generate`."""
        theirs, ours = pair(MISTRAL)
        options = {**VARIED, "max_new_tokens": 4}
        before = passes_of(ours, compiled=True).traces()
        tf.config.run_functions_eagerly(True)
        try:
            assert tokens(ours, prompts(), **options) == tokens(theirs, prompts(), **options)
        finally:
            tf.config.run_functions_eagerly(False)
        assert passes_of(ours, compiled=True).traces() == before

    def test_generators_and_global_seed(self, pair: Pair) -> None:
        _, model = pair(MISTRAL)
        sampling = {
            **OPTIONS,
            "max_new_tokens": 8,
            "do_sample": True,
            "temperature": 1.5,
            "top_k": 0,
            **GRAPH,
        }

        def drawn(**more: Any) -> list[list[int]]:
            return tokens(model, prompts(), **{**sampling, **more})

        first = drawn(seed=7)
        assert first == drawn(seed=(0, 7)) == drawn(seed=tf.constant([0, 7]))
        assert first == drawn(seed=7, jit_compile=True), "XLA samples the same tokens"
        made = [drawn(generator=tf.random.Generator.from_seed(3)) for _ in range(2)]
        assert made[0] == made[1] != first
        again = []
        for _ in range(2):
            tf.random.set_seed(5)
            again.append(drawn())
        assert again[0] == again[1] != drawn(), "without a seed: TensorFlow's global one"

    def test_output_classes_of_beams(self, pair: Pair) -> None:
        options = {**OPTIONS, **BEAMS, "return_dict_in_generate": True, **EAGER}
        for sample, kind in ((False, "Search"), (True, "Sample")):
            found = pair(MISTRAL)[1].generate(**numpy(prompts()), **{**options, "do_sample": sample})
            assert type(found).__name__ == f"TFBeam{kind}DecoderOnlyOutput"

    # ---------------------------------------------------------------------------- inside a tf.function

    def test_generate_as_a_tf_function(self, pair: Pair) -> None:
        """`tf.function(model.generate, jit_compile=True)`, as transformers' TF classes were compiled."""
        theirs, ours = pair(MISTRAL)
        free = tokens(theirs, prompts(), **VARIED)
        options = {**VARIED, "eos_token_id": [free[0][23 + 3], free[1][23 + 7], free[2][23 + 5]]}
        expected = tokens(theirs, prompts(), **options)
        compiled = tf.function(ours.generate, jit_compile=True)
        given = {name: tf.constant(value) for name, value in numpy(prompts()).items()}
        found = compiled(**given, **options).numpy()
        assert found.shape == (3, 23 + NEW), "max_length columns"
        longest = len(expected[0])
        assert found[:, :longest].tolist() == expected
        assert (found[:, longest:] == 3).all(), "filled with the pad token"
        compiled(**given, **options)
        assert compiled.experimental_get_tracing_count() == 1

    def test_beams_and_seeds_inside_a_tf_function(self, pair: Pair) -> None:
        theirs, ours = pair(MISTRAL)
        ids = tf.constant(prompts()["input_ids"].numpy())

        @tf.function(autograph=False)
        def run(ids: Any, seed: Any) -> Any:
            beams = ours.generate(ids, **{**OPTIONS, **BEAMS}, return_dict_in_generate=True)
            sampling = {**OPTIONS, **SAMPLED, "max_new_tokens": 6, "num_return_sequences": 2}
            return beams, ours.generate(ids, seed=seed, **sampling), ours.generate(ids, **sampling)

        beams, seeded, free = run(ids, tf.constant([0, 9]))
        # Pad tokens in the prompt are padding, without a mask too.
        expected = theirs.generate(**prompts(), **{**OPTIONS, **BEAMS}, return_dict_in_generate=True)
        width = expected.sequences.shape[1]
        assert type(beams).__name__ == "TFBeamSearchDecoderOnlyOutput"
        assert beams.sequences.numpy()[:, :width].tolist() == expected.sequences.tolist()
        assert beams.beam_indices.numpy()[:, : width - 23].tolist() == expected.beam_indices.tolist()
        outside = ours.generate(
            ids, seed=9, **{**OPTIONS, **SAMPLED, "max_new_tokens": 6, "num_return_sequences": 2}, **GRAPH
        )
        assert seeded.numpy().tolist() == outside.numpy().tolist()
        assert (
            free.numpy().tolist()
            != seeded.numpy().tolist()
            != run(ids, tf.constant([0, 10]))[1].numpy().tolist()
        )

    def test_generate_in_a_saved_model(self, pair: Pair, tmp_path: Path) -> None:
        """A SavedModel whose signature generates for any number of rows."""
        theirs, ours = pair(GPT_NEO)

        class Served(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = ours

            @tf.function(input_signature=[tf.TensorSpec((None, 23), tf.int32)] * 2)
            def serve(self, input_ids: Any, attention_mask: Any) -> Any:
                options = {**OPTIONS, "max_new_tokens": 6}
                return {"sequences": ours.generate(input_ids, attention_mask=attention_mask, **options)}

        module = Served()
        tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
        serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
        given = prompts(GPT_NEO)
        for rows in (3, 2):
            some = {name: x[:rows] for name, x in given.items()}
            out = serve(**{name: tf.constant(x.numpy(), tf.int32) for name, x in some.items()})
            assert out["sequences"].numpy().tolist() == tokens(
                theirs, some, **{**OPTIONS, "max_new_tokens": 6}
            )

    def test_graph_mode_limitations_raise(self, pair: Pair) -> None:
        _, ours = pair(GPT_NEO)
        any_length, any_rows, fixed = (tf.TensorSpec(s, tf.int32) for s in ((1, None), (None, 4), (1, 4)))

        def traced(spec: tf.TensorSpec, **options: Any) -> None:
            run = tf.function(lambda ids: ours.generate(ids, **{**OPTIONS, **options}), autograph=False)
            run.get_concrete_function(spec)

        wrong: list[tuple[Any, dict[str, Any], str]] = [
            (any_length, {}, "the prompts must be (rows, tokens) of a static length"),
            (
                any_rows,
                {"num_beams": 2},
                "num_beams: inside a tf.function this needs a static number of rows",
            ),
            (fixed, {"use_cache": False}, "is one graph, and this call needs Python between tokens"),
            (fixed, {"logits_processor": [lambda ids, scores: scores]}, "needs Python between tokens"),
            (fixed, {"max_new_tokens": 62}, "62 new tokens do not fit: the model has 64 learned positions"),
        ]
        for spec, options, message in wrong:
            with pytest.raises(ValueError, match=re.escape(message)):
                traced(spec, **options)
