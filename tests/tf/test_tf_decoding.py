"""What `generate` takes and gives on TensorFlow beside tokens: streams, recorded values, caches, guesses, errors."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_pairs
import torch
from measure import assert_close
from tiny_families import model_inputs

from monoblock import GenerationConfig
from monoblock.backends.tf.decode import TFGreedySearchDecoderOnlyOutput
from monoblock.backends.tf.passes import TFPasses, passes_of
from monoblock.errors import UnsupportedConfig
from monoblock.generation.resolve import UNSUPPORTED, UNSUPPORTED_ARGUMENTS

torch.set_num_threads(1)
tf.get_logger().setLevel("ERROR")

NAME = "MistralForCausalLM"
ATOL = 2e-5  # fp32, 2 layers; scores reach 10
ASKED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, "max_new_tokens": 8}
VARIED = {**ASKED, "no_repeat_ngram_size": 2}
GRAPH: dict[str, Any] = {"jit_compile": False}
EAGER: dict[str, Any] = {"disable_compile": True}
Pairs = Callable[[str], tuple[Any, Any]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The same random model on PyTorch and on TensorFlow, once for all tests."""
    return functools.cache(lambda name: tf_pairs.pair(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def model(pairs: Pairs) -> Any:
    return pairs(NAME)[1]


@pytest.fixture
def expected(pairs: Pairs) -> Callable[..., list[list[int]]]:
    def tokens(ids: Any, **asked: Any) -> list[list[int]]:
        return pairs(NAME)[0].generate(torch.as_tensor(np.asarray(ids)), **{**VARIED, **asked}).tolist()

    return tokens


def ids_of(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 89, (rows, length))


def test_the_old_call_and_its_result(model: Any) -> None:
    ids = ids_of(2, 7)
    old = model.generate(tf.constant(ids), max_length=15, pad_token_id=3, **GRAPH)
    assert tf.is_tensor(old)
    assert (old.dtype, old.shape) == (tf.int32, (2, 15))
    config = GenerationConfig(max_new_tokens=8, pad_token_id=3, do_sample=False)
    ways = {
        "config": model.generate(ids, config, **GRAPH),
        "a tokenizer's output": model.generate(
            {"input_ids": ids, "attention_mask": np.ones_like(ids)}, config, **GRAPH
        ),
        "lists": model.generate(input_ids=ids.tolist(), generation_config=config, **GRAPH),
        "eager": model.generate(ids, config, **EAGER),
        "an output": model.generate(ids, config, return_dict_in_generate=True, **GRAPH).sequences,
    }
    for how, found in ways.items():
        assert found.numpy().tolist() == old.numpy().tolist(), how
    only_bos = model.generate(max_new_tokens=2, **EAGER)
    assert only_bos.shape == (1, 3)
    assert only_bos[0, 0] == 1


def test_streams(model: Any, expected: Callable[..., list[list[int]]]) -> None:
    got: list[Any] = []

    class Streamer:
        def put(self, value: Any) -> None:
            got.append(np.asarray(value).reshape(-1).tolist())

        def end(self) -> None:
            got.append("end")

    ids = ids_of(1, 7)
    found = model.generate(ids, streamer=Streamer(), **VARIED, **GRAPH).numpy().tolist()
    assert found == expected(ids)
    assert got == [found[0][:7], *([token] for token in found[0][7:]), "end"]


def test_processors_and_criteria_of_the_callers_get_tensors(model: Any) -> None:
    ids = ids_of(1, 7)

    def ban(input_ids: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        return tf.where(tf.one_hot(input_ids[:, -1], scores.shape[-1]) > 0, -np.inf, scores)

    class OfThree:
        """As transformers' TF classes called them."""

        def __call__(self, input_ids: tf.Tensor, scores: tf.Tensor, cur_len: int) -> tf.Tensor:
            assert cur_len == input_ids.shape[1]
            return ban(input_ids, scores)

    def enough(input_ids: tf.Tensor, scores: Any) -> tf.Tensor:
        assert scores is None
        return tf.fill((input_ids.shape[0],), input_ids.shape[1] >= 11)

    for own in (ban, OfThree()):
        found = model.generate(ids, None, [own], stopping_criteria=[enough], **ASKED, **EAGER)
        assert found.shape == (1, 11)
        assert (np.diff(found.numpy()[0, 6:]) != 0).all()


@pytest.mark.parametrize("how", [{}, {"use_cache": False}], ids=str)
def test_what_is_recorded(how: dict[str, Any], pairs: Pairs) -> None:
    """Places of the bucket's padding are nobody's."""
    theirs, model = pairs(NAME)
    ids, mask = model_inputs(NAME, "left")
    kinds = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = {
        **VARIED,
        **how,
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        **dict.fromkeys(kinds, True),
    }
    other = theirs.generate(ids, attention_mask=mask, **asked)
    found = model.generate(ids.numpy(), attention_mask=mask.numpy(), **asked, **GRAPH)
    assert isinstance(found, TFGreedySearchDecoderOnlyOutput)
    assert found.sequences.numpy().tolist() == other.sequences.tolist()
    for name in ("scores", "logits"):
        for mine, their in zip(getattr(found, name), getattr(other, name), strict=True):
            np.testing.assert_allclose(mine, their, atol=ATOL, err_msg=name)
    for step, (mine, their) in enumerate(zip(found.hidden_states, other.hidden_states, strict=True)):
        real = torch.nn.functional.pad(mask, (0, step), value=1)[:, -their[0].shape[1] :]
        for a, b in zip(mine, their, strict=True):
            assert_close("hidden states", a, b, ATOL, real)
    for step, layers in enumerate(found.attentions):
        for weights in layers:
            assert weights.shape == (3, 6, 23 + step if "use_cache" in how or not step else 1, 23 + step)
            np.testing.assert_allclose(weights[:, :, -1].numpy().sum(-1), 1, atol=1e-5)
    values = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    their = theirs.compute_transition_scores(other.sequences, other.scores, normalize_logits=True)
    np.testing.assert_allclose(values, their, atol=ATOL)


def test_a_given_cache_is_the_beginning_of_the_prompt(
    model: Any, expected: Callable[..., list[list[int]]]
) -> None:
    """Its windows have rolled, and its places are too few: it grows, and stays as it was."""
    ids = ids_of(1, 31)
    asked = {**VARIED, "suppress_tokens": [3]}  # which is the pad token: none in the middle
    first = model.generate(ids[:, :20], return_dict_in_generate=True, **asked, **GRAPH)
    cache = first.past_key_values
    assert int(cache.length) == 27
    text = np.concatenate((first.sequences.numpy()[:, :28], ids[:, 27:]), axis=1)
    for _ in range(2):
        found = model.generate(text, past_key_values=cache, **asked, **EAGER)
        assert found.numpy().tolist() == expected(text, **asked)
    with pytest.raises(ValueError, match="past_key_values hold 27 tokens and the prompt has 20"):
        model.generate(ids[:, :20], past_key_values=cache, **VARIED)
    tuples = model(ids[:, :20], use_cache=True).past_key_values
    assert isinstance(tuples, tuple)
    found = model.generate(ids, past_key_values=tuples, **VARIED, **EAGER)
    assert found.numpy().tolist() == expected(ids)


@pytest.mark.parametrize("how", ["lookup", "lookup without a cache", "assistant"])
def test_guesses_change_nothing(how: str, model: Any, expected: Callable[..., list[list[int]]]) -> None:
    """Past the window, whose tokens are taken back."""
    ids = ids_of(1, 20)
    guesses = {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "lookup without a cache": {"prompt_lookup_num_tokens": 5, "use_cache": False},
        "assistant": {"assistant_model": model, "num_assistant_tokens": 3},
    }[how]
    found = model.generate(ids, **{**ASKED, "max_new_tokens": 20}, **guesses, **EAGER)
    assert found.numpy().tolist() == expected(ids, max_new_tokens=20, no_repeat_ngram_size=None)


def test_guidance(model: Any, expected: Callable[..., list[list[int]]]) -> None:
    ids, other = ids_of(1, 9), ids_of(1, 5, seed=4)
    theirs = expected(ids, negative_prompt_ids=torch.tensor(other), guidance_scale=1.7)
    assert theirs != expected(ids)
    found = model.generate(ids, negative_prompt_ids=other, guidance_scale=1.7, **VARIED, **GRAPH)
    assert found.numpy().tolist() == theirs


def test_half_precision(pairs: Pairs) -> None:
    """The cache has the computation's type; the tokens are those of passes without one."""
    model = tf_pairs.make_class("TF" + NAME)(pairs(NAME)[1].config, dtype="mixed_bfloat16")
    out = model.generate(ids_of(1, 9), return_dict_in_generate=True, **ASKED, **GRAPH)
    assert {layer.dtype for layer in out.past_key_values.keys} == {tf.bfloat16}
    text = out.sequences.numpy()
    logits = model(text[:, :-1], use_cache=False).logits.numpy().astype(np.float32)[0, 8:]
    chosen = logits[np.arange(8), text[0, 9:]]
    # bfloat16 has 8 bits, and the two ways of computing round on their own.
    assert (chosen >= logits.max(-1) - 0.02 * np.abs(logits).max()).all()


# ---------------------------------------------------------------------------- options


def test_a_prompt_in_chunks(
    model: Any, expected: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the window and padded; the rest of a prompt goes in powers of two, so that few lengths are traced."""
    sizes: list[int] = []
    extend = TFPasses.extend

    def counted(self: TFPasses, given: Any, cache: Any, options: Any) -> Any:
        sizes.append(given["input_ids"].shape[1])
        return extend(self, given, cache, options)

    monkeypatch.setattr(TFPasses, "extend", counted)
    monkeypatch.setattr(TFPasses, "prefill", None)
    ids = ids_of(1, 23)
    mask = np.ones_like(ids)
    mask[:, :5] = 0
    found = model.generate(ids, attention_mask=mask, prefill_chunk_size=6, **VARIED, **GRAPH)
    assert found.numpy().tolist() == expected(ids, attention_mask=torch.as_tensor(mask))
    assert sizes == [6, 6, 6, 4, 1]
    before = passes_of(model, compiled=False).traces()
    found = model.generate(ids_of(1, 29), prefill_chunk_size=6, **VARIED, **GRAPH)
    assert found.numpy().tolist() == expected(ids_of(1, 29))
    assert passes_of(model, compiled=False).traces() == before

    @tf.function(autograph=False)
    def inside(ids: Any) -> Any:
        return model.generate(ids, prefill_chunk_size=6, **ASKED)

    with pytest.raises(ValueError, match="prefill_chunk_size is not supported inside"):
        inside(tf.constant(ids))


REASONS = {
    "cache_implementation": "the caches of the TF classes are 'dynamic' and 'static'",
    "compile_config": "jit_compile= and disable_compile= say what TensorFlow compiles",
    "synced_gpus": "generation across processes is not implemented",
}


def test_every_refused_option_is_named(model: Any) -> None:
    for name, (_, reason) in (UNSUPPORTED | UNSUPPORTED_ARGUMENTS).items():
        with pytest.raises(
            UnsupportedConfig, match=f"{name}='else': .*{re.escape(REASONS.get(name, reason))}"
        ):
            model.generate(ids_of(1, 7), **{**ASKED, name: "else"})


def test_what_is_wrong_is_told(model: Any, pairs: Pairs) -> None:
    ids = ids_of(1, 7)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        (
            {"cache_implementation": "static", "max_cache_len": 9},
            "the static cache has room for 9 tokens and up to 14 are needed",
        ),
        ({"seed": (1, 2, 3)}, "seed must be one or two integers"),
        (
            {"generator": tf.random.Generator.from_seed(1), "seed": 1},
            "generate() got both seed and generator: pass one",
        ),
        ({"token_type_ids": ids}, "token_type_ids"),
        ({"prefill_chunk_size": 2, "use_cache": False}, "cannot be combined with use_cache=False"),
        (
            {"bad_words_ids": [[5], [9999]]},
            "holds the token 9999, but the model's vocabulary has the ids 0 to",
        ),
    ]
    for more, sentence in wrong:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            model.generate(ids, **{**ASKED, **more}, **EAGER)
    with pytest.raises(ValueError, match="input_ids hold the token 1000, but the model's vocabulary has"):
        model.generate([[1000]], **ASKED)
    with pytest.raises(
        TypeError, match=r"TFMistralModel has no language-model head: generate with a \.\.\.ForCausalLM"
    ):
        tf_pairs.model("MistralModel").generate(ids)
    with pytest.raises(TypeError, match="no language-model head"):
        tf_pairs.model("MPNetForMaskedLM").generate(ids)
    with pytest.raises(TypeError, match="assistant_model must be one of monoblock's"):
        model.generate(ids, assistant_model=pairs(NAME)[0], **ASKED)
    with pytest.raises(TypeError, match=r"generator must be a tf\.random\.Generator, got Generator"):
        model.generate(ids, generator=torch.Generator(), **ASKED)
