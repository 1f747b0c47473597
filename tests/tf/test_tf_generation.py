"""Generation on TensorFlow: PyTorch's tokens in every family, with XLA, in graphs, eagerly and inside a `tf.function`;
what is traced, and when."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_calls
import numpy as np
import pytest
import tensorflow as tf
import tf_pairs
import torch
import v4_checkpoints
from tiny_families import GENERATING, VOCAB, with_images

import monoblock
from monoblock.backends.tf.arrays import TfOps, largest
from monoblock.backends.tf.passes import passes_of
from monoblock.generation.arrays import NumpyOps

torch.set_num_threads(1)
# Tests make many small graphs one after the other, of which TensorFlow warns.
tf.get_logger().setLevel("ERROR")

MPT, MISTRAL, GPT_NEO = "MptForCausalLM", "MistralForCausalLM", "GPTNeoForCausalLM"
NEW = 30  # tokens, beyond every window of 9 and less
ASKED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, "max_new_tokens": NEW}
# Small random models fall into one token's loop, where a wrong cache would go unseen.
VARIED: dict[str, Any] = {**ASKED, "no_repeat_ngram_size": 2}
XLA: dict[str, Any] = {}
GRAPH: dict[str, Any] = {"jit_compile": False}
EAGER: dict[str, Any] = {"disable_compile": True}
# XLA takes seconds for each model: two of them show it, and the others their own arithmetic.
HOW = {MPT: GRAPH, MISTRAL: XLA, GPT_NEO: XLA, "FuyuForCausalLM": EAGER, "OpenAIGPTLMHeadModel": GRAPH}
Pair = tuple[Any, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The same random model on PyTorch and on TensorFlow, once for all tests."""
    return functools.cache(lambda name: tf_pairs.pair(name, tmp_path_factory.mktemp(name)))


def prompts(name: str = MISTRAL, padding: str = "left") -> dict[str, torch.Tensor]:
    return tf_pairs.inputs(name, padding)


def numpy(given: dict[str, Any]) -> dict[str, Any]:
    def turned(value: Any) -> Any:
        if isinstance(value, list):
            return [turned(item) for item in value]
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return {name: turned(value) for name, value in given.items()}


def tokens(model: Any, given: dict[str, Any], **asked: Any) -> list[list[int]]:
    """The ids that either kind of model gives."""
    if isinstance(model, torch.nn.Module):
        return model.generate(**given, **asked).tolist()
    found = model.generate(**numpy(given), **asked)
    assert tf.is_tensor(found)
    assert found.dtype == tf.int32
    return found.numpy().tolist()


# ---------------------------------------------------------------------------- operations


def _converted(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return tf.constant(value)
    return [_converted(item) for item in value] if isinstance(value, list) else value


def test_operations_are_numpys_eagerly_and_in_a_graph() -> None:
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


def test_the_largest_of_long_rows() -> None:
    """By blocks; among equal ones the first, as everywhere."""
    generator = np.random.default_rng(0)
    for rows, count, k, kinds in ((2, 5000, 7, 9), (1, 5000, 50, 10**6), (3, 1001, 1, 4), (2, 640, 640, 50)):
        x = generator.integers(0, kinds, (rows, count)).astype(np.float32)
        x[0, : count // 2] = -np.inf
        values, index = largest(tf.constant(x), k)
        expected, places = NumpyOps().top_k(x, k)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(index, places)


# ---------------------------------------------------------------------------- PyTorch's tokens


@pytest.mark.parametrize("name", [MPT, *GENERATING])
def test_the_same_tokens_as_pytorch_padded_and_past_the_window(
    name: str, pair: Callable[[str], Pair]
) -> None:
    theirs, ours = pair(name)
    given, how = prompts(name), HOW[name]
    expected = tokens(theirs, given, **VARIED)
    assert len({token for row in expected for token in row[23:]}) > 10, "tokens that say something"
    assert tokens(ours, given, **VARIED, **how) == expected
    alone = tokens(ours, {"input_ids": given["input_ids"][1:2, -9:]}, **VARIED, **EAGER)
    assert [row[9:] for row in alone] == [expected[1][23:]], "a row on its own"


def test_a_window_in_some_layers(tmp_path: Path) -> None:
    """Windowed layers drop what full ones keep, in a graph and eagerly."""
    layers = ["full_attention", "sliding_attention", "full_attention"]
    theirs, ours = tf_pairs.pair(MISTRAL, tmp_path, layer_types=layers, num_hidden_layers=3)
    given = prompts(MISTRAL)
    expected = tokens(theirs, given, **VARIED)
    assert len({token for row in expected for token in row[23:]}) > 10, "tokens that say something"
    assert tokens(ours, given, **VARIED, **GRAPH) == expected
    assert tokens(ours, given, **VARIED, **EAGER) == expected


@pytest.mark.parametrize("name", [name for name in v4_checkpoints.TENSORFLOW if v4_checkpoints.prompt(name)])
def test_the_recorded_tokens_of_the_old_classes(name: str) -> None:
    found = v4_checkpoints.prompt(name)
    assert found is not None
    ids, expected = found
    model = getattr(monoblock, name).from_pretrained(v4_checkpoints.FOLDER / name)
    assert (
        model.generate(ids, max_new_tokens=12, do_sample=False, **EAGER).numpy().tolist() == expected.tolist()
    )


def test_no_cache(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**VARIED, "max_new_tokens": 8}
    expected = tokens(theirs, prompts(), **asked)
    assert tokens(ours, prompts(), **asked, **GRAPH, use_cache=False) == expected


BEAMS = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 14, "eos_token_id": [2, 17, 30]}
RULES = [
    ({}, XLA),
    ({"length_penalty": 2.0, "early_stopping": "never"}, GRAPH),
    ({"length_penalty": -1.0, "early_stopping": True, "repetition_penalty": 1.3}, GRAPH),
    ({"length_penalty": 0.0, "no_repeat_ngram_size": 2, "min_new_tokens": 4}, EAGER),
]


@pytest.mark.parametrize(("rules", "how"), RULES, ids=str)
def test_the_same_beams_as_pytorch(
    rules: dict[str, Any], how: dict[str, Any], pair: Callable[[str], Pair]
) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**ASKED, **BEAMS, **rules}
    assert tokens(ours, prompts(), **asked, **how) == tokens(theirs, prompts(), **asked)


def test_scores_and_rows_of_beams(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**ASKED, **BEAMS, "return_dict_in_generate": True, "output_scores": True}
    expected, found = (
        theirs.generate(**prompts(), **asked),
        ours.generate(**numpy(prompts()), **asked, **EAGER),
    )
    assert type(found).__name__ == "TFBeamSearchDecoderOnlyOutput"
    assert found.sequences.numpy().tolist() == expected.sequences.tolist()
    assert found.beam_indices.numpy().tolist() == expected.beam_indices.tolist()
    # Sums of 14 logarithms in float32.
    np.testing.assert_allclose(found.sequences_scores, expected.sequences_scores, atol=1e-5)


PROCESSORS = [
    {"repetition_penalty": 1.4, "min_new_tokens": 5, "eos_token_id": [9, 2], "suppress_tokens": [40, 41]},
    {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "forced_eos_token_id": 2},
    {
        "bad_words_ids": [[5], [6, 7], [50, 51, 52]],
        "sequence_bias": [[[60], 2.0], [[60, 61], 9.0], [[61, 60], 9.0]],
    },
    {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 44, "begin_suppress_tokens": [60]},
    {
        "min_length": 30,
        "eos_token_id": list(range(10, 60)),
        "remove_invalid_values": True,
        "renormalize_logits": True,
    },
]


@pytest.mark.parametrize("fields", PROCESSORS, ids=lambda fields: next(iter(fields)))
def test_processors_inside_the_graph(fields: dict[str, Any], pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**VARIED, "max_new_tokens": 14, **fields}
    expected = tokens(theirs, prompts(), **asked)
    assert expected != tokens(theirs, prompts(), **{**VARIED, "max_new_tokens": 14}), "the fields must matter"
    assert tokens(ours, prompts(), **asked, **GRAPH) == expected


def test_a_forced_first_token(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair(MISTRAL)
    asked = {**ASKED, "max_new_tokens": 5, "forced_bos_token_id": 33, "begin_suppress_tokens": [60]}
    for ids in ([[10]], [[10, 11]]):
        given = {"input_ids": torch.tensor(ids)}
        assert tokens(ours, given, **asked, **GRAPH) == tokens(theirs, given, **asked)


def test_images_types_positions_and_embeddings(pair: Callable[[str], Pair]) -> None:
    asked = {**ASKED, "max_new_tokens": 8}
    theirs, ours = pair("FuyuForCausalLM")
    ids, mask, patches, places = with_images((6, 0, 9))
    images = {"image_patches": patches, "image_patches_indices": places}
    given = {"input_ids": ids, "attention_mask": mask}
    expected = tokens(theirs, given | images, **asked)
    assert expected != tokens(theirs, given, **asked), "the images must matter"
    for how in (GRAPH, EAGER):
        assert tokens(ours, given | images, **asked, **how) == expected
    assert tokens(ours, given | {"pixel_values": torch.cat(patches)}, **asked, **GRAPH) == expected
    theirs, ours = pair("OpenAIGPTLMHeadModel")
    given = prompts("OpenAIGPTLMHeadModel")
    types = {"token_type_ids": given["input_ids"] * 3 % VOCAB}
    assert tokens(ours, given | types, **asked, **GRAPH) == tokens(theirs, given | types, **asked)
    theirs, ours = pair(GPT_NEO)
    given = {"input_ids": prompts(GPT_NEO)["input_ids"]}
    moved = {"position_ids": (torch.arange(23) + 5).expand(3, -1)}
    for how in ({}, {"use_cache": False}):
        expected = tokens(theirs, given | moved, **asked, **how)
        assert tokens(ours, given | moved, **asked, **how, **EAGER) == expected
    embeds = {"inputs_embeds": theirs.get_input_embeddings()(given["input_ids"]).detach()}
    assert tokens(ours, embeds, **asked, **EAGER) == tokens(theirs, embeds, **asked)


# ---------------------------------------------------------------------------- what is traced

SAMPLED = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {**SAMPLED, "min_new_tokens": 2},
        {"num_beams": 3},
        {"logits_processor": [lambda ids, scores: scores]},
    ],
    ids=["greedy", "sampling", "beams", "host"],
)
def test_ten_prompts_of_ten_lengths_are_traced_once(
    asked: dict[str, Any], pair: Callable[[str], Pair]
) -> None:
    _, model = pair(MISTRAL)
    ids = prompts(padding="none")["input_ids"].numpy()[:1].repeat(2, axis=1)
    model.generate(ids[:, :17], **{**ASKED, **asked, "max_new_tokens": 9}, **GRAPH)
    before = passes_of(model, compiled=False).traces()
    for length in range(18, 28):
        numbers = {"temperature": length / 20, "top_p": 0.5 + length / 100, "repetition_penalty": length / 9}
        asked = asked | {name: value for name, value in numbers.items() if name in asked}
        out = model.generate(ids[:, :length], **{**ASKED, **asked, "max_new_tokens": length - 15}, **GRAPH)
        assert out.shape == (1, 2 * length - 15)
    assert passes_of(model, compiled=False).traces() == before


def test_xla_compiles_a_step_once(pair: Callable[[str], Pair]) -> None:
    """Not for each length of the cache, which a slice in the step would have it do."""
    _, model = pair(GPT_NEO)
    ids = prompts(GPT_NEO, "none")["input_ids"].numpy()[:1]
    asked = {**ASKED, "logits_processor": [lambda ids, scores: scores]}

    def seconds(length: int, new: int) -> float:
        before = time.process_time()
        model.generate(ids[:, :length], **{**asked, "max_new_tokens": new})
        return time.process_time() - before

    compiling = seconds(17, 2)
    # Ten lengths more: hundredths of a second, or ten times as long as it took to compile one.
    assert seconds(18, 12) < compiling / 2


def test_other_weights_need_no_trace_and_other_variables_do() -> None:
    model, ids = tf_pairs.model(MISTRAL), [[10, 11, 12]]
    asked = {**ASKED, "max_new_tokens": 4, **GRAPH}
    first = model.generate(ids, **asked).numpy().tolist()
    traces = passes_of(model, compiled=False).traces()
    for variable in model.trainable_variables:
        variable.assign(variable * -0.7)
    other = model.generate(ids, **asked).numpy().tolist()
    assert other != first
    assert passes_of(model, compiled=False).traces() == traces
    model.resize_token_embeddings(VOCAB + 3)
    assert model.generate([[VOCAB + 1]], **asked).shape == (1, 5)


def test_functions_run_eagerly(pair: Callable[[str], Pair]) -> None:
    """TensorFlow's own switch for debugging holds for whole generations too."""
    theirs, ours = pair(MISTRAL)
    asked = {**VARIED, "max_new_tokens": 4}
    before = passes_of(ours, compiled=True).traces()
    tf.config.run_functions_eagerly(True)
    try:
        assert tokens(ours, prompts(), **asked) == tokens(theirs, prompts(), **asked)
    finally:
        tf.config.run_functions_eagerly(False)
    assert passes_of(ours, compiled=True).traces() == before


# ---------------------------------------------------------------------------- ends and draws


def test_rows_end_on_their_own_and_the_loop_with_the_last(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair(MISTRAL)
    free = tokens(theirs, prompts(), **VARIED)
    ends = [free[0][23 + 3], free[1][23 + 7], free[2][23 + 5]]
    asked = {**VARIED, "eos_token_id": ends, "return_dict_in_generate": True}
    expected, found = (
        theirs.generate(**prompts(), **asked),
        ours.generate(**numpy(prompts()), **asked, **GRAPH),
    )
    assert type(found).__name__ == "TFGreedySearchDecoderOnlyOutput"
    assert found.sequences.numpy().tolist() == expected.sequences.tolist()
    assert 23 < found.sequences.shape[1] < 23 + NEW
    assert int(found.past_key_values.length) == found.sequences.shape[1] - 1, "no token came after the last"


def test_draws(pair: Callable[[str], Pair]) -> None:
    theirs, model = pair(MISTRAL)
    asked = {**ASKED, "max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_k": 0, **GRAPH}

    def drawn(**more: Any) -> list[list[int]]:
        return tokens(model, prompts(), **{**asked, **more})

    first = drawn(seed=7)
    assert first == drawn(seed=7) == drawn(seed=(0, 7)) == drawn(seed=tf.constant([0, 7]))
    assert first == drawn(seed=7, **EAGER), "the host loop draws the same"
    assert first == drawn(seed=7, jit_compile=True), "so does XLA"
    assert first != drawn(seed=8)
    made = [drawn(generator=tf.random.Generator.from_seed(3)) for _ in range(2)]
    assert made[0] == made[1] != first
    again = []
    for _ in range(2):
        tf.random.set_seed(5)
        again.append(drawn())
    assert again[0] == again[1] != drawn(), "without a seed TensorFlow's global one"
    greedy = tokens(theirs, prompts(), **{**ASKED, "max_new_tokens": 8})
    assert drawn(top_k=1) == drawn(temperature=1e-4) == greedy
    assert len({tuple(row) for row in drawn(num_return_sequences=3)}) == 9


def test_draws_have_the_models_probabilities(pair: Callable[[str], Pair]) -> None:
    _, model = pair(MISTRAL)
    ids = prompts(padding="none")["input_ids"].numpy()[:1, :6]
    logits = model(ids).logits.numpy()[0, -1].astype(np.float64) / 2
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    out = model.generate(
        ids,
        do_sample=True,
        temperature=2.0,
        top_k=0,
        max_new_tokens=1,
        num_return_sequences=2000,
        seed=1,
        **EAGER,
    )
    share = np.bincount(out.numpy()[:, -1], minlength=VOCAB) / 2000
    # Four standard deviations of a share of 2000 draws.
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3).all()


def test_sampled_beams_draw_the_same_in_either_loop(pair: Callable[[str], Pair]) -> None:
    _, model = pair(MISTRAL)
    asked = {**ASKED, **BEAMS, "do_sample": True, "top_p": 0.9, "return_dict_in_generate": True}
    found = [model.generate(**numpy(prompts()), **asked, seed=3, **how) for how in (GRAPH, EAGER)]
    assert type(found[0]).__name__ == "TFBeamSampleDecoderOnlyOutput"
    for name in ("sequences", "beam_indices"):
        assert found[0][name].numpy().tolist() == found[1][name].numpy().tolist()


def test_nothing_to_draw_is_told_by_either_loop() -> None:
    model = tf_pairs.model(MISTRAL)
    table = model.get_input_embeddings().embeddings
    table.assign(table * np.nan)
    for how in (GRAPH, EAGER):
        with pytest.raises(ValueError, match="no token can be drawn"):
            model.generate([[10, 11]], do_sample=True, max_new_tokens=4, **how)


@pytest.mark.parametrize("how", [GRAPH, EAGER, {"use_cache": False, **EAGER}], ids=str)
def test_texts_end_with_the_table_of_positions(how: dict[str, Any], pair: Callable[[str], Pair]) -> None:
    """The bucket of a prompt does not count; a text may take the last position and have one token more."""
    theirs, ours = pair(GPT_NEO)
    given = {"input_ids": prompts(GPT_NEO, "none")["input_ids"].repeat(1, 3)[:1, :50]}
    asked = {**VARIED, "max_new_tokens": 64 - 50 + 1}
    assert tokens(ours, given, **asked, **how) == tokens(theirs, given, **asked)
    with pytest.raises(ValueError, match="16 new tokens do not fit: the model has 64 learned positions"):
        tokens(ours, given, **{**asked, "max_new_tokens": 64 - 50 + 2}, **how)


# ---------------------------------------------------------------------------- inside a tf.function


def test_generate_inside_a_users_function(pair: Callable[[str], Pair]) -> None:
    """`tf.function(model.generate, jit_compile=True)`, as transformers' TF classes were compiled."""
    theirs, ours = pair(MISTRAL)
    free = tokens(theirs, prompts(), **VARIED)
    asked = {**VARIED, "eos_token_id": [free[0][23 + 3], free[1][23 + 7], free[2][23 + 5]]}
    expected = tokens(theirs, prompts(), **asked)
    compiled = tf.function(ours.generate, jit_compile=True)
    given = {name: tf.constant(value) for name, value in numpy(prompts()).items()}
    found = compiled(**given, **asked).numpy()
    assert found.shape == (3, 23 + NEW), "room for all tokens"
    longest = len(expected[0])
    assert found[:, :longest].tolist() == expected
    assert (found[:, longest:] == 3).all(), "filled with the pad token"
    compiled(**given, **asked)
    assert compiled.experimental_get_tracing_count() == 1


def test_what_a_users_function_can_ask_for(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair(MISTRAL)
    ids = tf.constant(prompts()["input_ids"].numpy())

    @tf.function(autograph=False)
    def run(ids: Any, seed: Any) -> Any:
        beams = ours.generate(ids, **{**ASKED, **BEAMS}, return_dict_in_generate=True)
        sampling = {**ASKED, **SAMPLED, "max_new_tokens": 6, "num_return_sequences": 2}
        return beams, ours.generate(ids, seed=seed, **sampling), ours.generate(ids, **sampling)

    beams, seeded, free = run(ids, tf.constant([0, 9]))
    # Pad tokens in the prompt are padding, without a mask too.
    expected = theirs.generate(**prompts(), **{**ASKED, **BEAMS}, return_dict_in_generate=True)
    width = expected.sequences.shape[1]
    assert type(beams).__name__ == "TFBeamSearchDecoderOnlyOutput"
    assert beams.sequences.numpy()[:, :width].tolist() == expected.sequences.tolist()
    assert beams.beam_indices.numpy()[:, : width - 23].tolist() == expected.beam_indices.tolist()
    outside = ours.generate(
        ids, seed=9, **{**ASKED, **SAMPLED, "max_new_tokens": 6, "num_return_sequences": 2}, **GRAPH
    )
    assert seeded.numpy().tolist() == outside.numpy().tolist()
    assert (
        free.numpy().tolist() != seeded.numpy().tolist() != run(ids, tf.constant([0, 10]))[1].numpy().tolist()
    )


def test_an_exported_generation(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    """A SavedModel whose signature makes text, for any number of rows."""
    theirs, ours = pair(GPT_NEO)

    class Served(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ours

        @tf.function(input_signature=[tf.TensorSpec((None, 23), tf.int32)] * 2)
        def serve(self, input_ids: Any, attention_mask: Any) -> Any:
            asked = {**ASKED, "max_new_tokens": 6}
            return {"sequences": ours.generate(input_ids, attention_mask=attention_mask, **asked)}

    module = Served()
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
    serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    given = prompts(GPT_NEO)
    for rows in (3, 2):
        some = {name: x[:rows] for name, x in given.items()}
        out = serve(**{name: tf.constant(x.numpy(), tf.int32) for name, x in some.items()})
        assert out["sequences"].numpy().tolist() == tokens(theirs, some, **{**ASKED, "max_new_tokens": 6})


def test_what_a_graph_cannot_do_is_told(pair: Callable[[str], Pair]) -> None:
    _, ours = pair(GPT_NEO)
    open_length, open_rows, closed = (tf.TensorSpec(s, tf.int32) for s in ((1, None), (None, 4), (1, 4)))

    def traced(spec: tf.TensorSpec, **asked: Any) -> None:
        run = tf.function(lambda ids: ours.generate(ids, **{**ASKED, **asked}), autograph=False)
        run.get_concrete_function(spec)

    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (open_length, {}, "the prompts must be (rows, tokens) of a static length"),
        (open_rows, {"num_beams": 2}, "num_beams: inside a tf.function this needs a static number of rows"),
        (closed, {"use_cache": False}, "is one graph, and this call needs Python between two tokens"),
        (closed, {"logits_processor": [lambda ids, scores: scores]}, "needs Python between two tokens"),
        (closed, {"max_new_tokens": 62}, "62 new tokens do not fit: the model has 64 learned positions"),
    ]
    for spec, asked, sentence in wrong:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            traced(spec, **asked)
