"""Inputs and outputs of `generate` on TensorFlow: the contract; outputs and processors of transformers' TF classes,
half precision."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow as tf
import torch
from contract.decoding import EAGER, NAME, OPTIONS, VARIED, DecodingContract, of
from contract.models import Pair, ids_of, tokens

from monoblock import GenerationConfig
from monoblock.backends.tf.passes import TFPasses, passes_of

tf.get_logger().setLevel("ERROR")
GRAPH: dict[str, Any] = {"jit_compile": False}


class TestDecoding(DecodingContract):
    prefix = "TF"
    graph = GRAPH
    output = "TFGreedySearchDecoderOnlyOutput"
    reasons: ClassVar = {
        "cache_implementation": "the caches of the TF classes are 'dynamic' and 'static'",
        "compile_config": "jit_compile= and disable_compile= control compilation in TensorFlow",
        "synced_gpus": "generation across processes is not implemented",
    }
    invalid: ClassVar = [
        ({"seed": (1, 2, 3)}, "seed must be"),
        (
            {"generator": tf.random.Generator.from_seed(1), "seed": 1},
            "generate() got both seed and generator: pass one",
        ),
    ]

    @pytest.fixture
    def chunk_sizes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        sizes: list[int] = []
        more = TFPasses.extend

        def counted(self: TFPasses, given: Any, cache: Any, wanted: Any) -> Any:
            sizes.append(given["input_ids"].shape[1])
            return more(self, given, cache, wanted)

        monkeypatch.setattr(TFPasses, "extend", counted)
        monkeypatch.setattr(TFPasses, "prefill", None)
        return sizes

    def programs(self, model: Any) -> Any:
        return passes_of(model, compiled=False).traces()

    def test_calls_of_transformers_tf_classes(self, pair: Pair) -> None:
        model, ids = pair(NAME)[1], ids_of(2, 7)
        old = model.generate(tf.constant(ids), max_length=15, pad_token_id=3, **GRAPH)
        assert tf.is_tensor(old)
        assert (old.dtype, old.shape) == (tf.int32, (2, 15))
        config = GenerationConfig(max_new_tokens=8, pad_token_id=3, do_sample=False)
        encoding = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        calls = {
            "config": model.generate(ids, config, **GRAPH),
            "a tokenizer's output": model.generate(encoding, config, **GRAPH),
            "lists": model.generate(input_ids=ids.tolist(), generation_config=config, **GRAPH),
            "eager": model.generate(ids, config, **EAGER),
            "an output": model.generate(ids, config, return_dict_in_generate=True, **GRAPH).sequences,
        }
        for form, found in calls.items():
            assert found.numpy().tolist() == old.numpy().tolist(), form
        only_bos = model.generate(max_new_tokens=2, **EAGER)
        assert only_bos.shape == (1, 3)
        assert only_bos[0, 0] == 1

    def test_custom_processors_and_criteria_get_tensors(self, pair: Pair) -> None:
        def ban(input_ids: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
            return tf.where(tf.one_hot(input_ids[:, -1], scores.shape[-1]) > 0, -np.inf, scores)

        class WithLength:
            """The signature of transformers' TF processors."""

            def __call__(self, input_ids: tf.Tensor, scores: tf.Tensor, cur_len: int) -> tf.Tensor:
                assert cur_len == input_ids.shape[1]
                return ban(input_ids, scores)

        def enough(input_ids: tf.Tensor, scores: Any) -> tf.Tensor:
            assert scores is None
            return tf.fill((input_ids.shape[0],), input_ids.shape[1] >= 11)

        model = pair(NAME)[1]
        for processor in (ban, WithLength()):
            found = model.generate(
                ids_of(1, 7), None, [processor], stopping_criteria=[enough], **OPTIONS, **EAGER
            )
            assert found.shape == (1, 11)
            assert (np.diff(found.numpy()[0, 6:]) != 0).all()

    def test_given_cache_as_tuples(self, pair: Pair) -> None:
        theirs, model = pair(NAME)
        ids = ids_of(1, 31)
        tuples = model(ids[:, :20], use_cache=True).past_key_values
        assert isinstance(tuples, tuple)
        found = tokens(model, of(ids), past_key_values=tuples, **VARIED, **EAGER)
        assert found == tokens(theirs, of(ids), **VARIED)

    def test_half_precision(self, pair: Pair) -> None:
        """The cache has the compute dtype; the tokens are those of passes without a cache."""
        made = pair(NAME)[1]
        model = type(made)(made.config, dtype="mixed_bfloat16")
        out = model.generate(ids_of(1, 9), return_dict_in_generate=True, **OPTIONS, **GRAPH)
        assert {layer.dtype for layer in out.past_key_values.keys} == {tf.bfloat16}
        sequence = out.sequences.numpy()
        logits = model(sequence[:, :-1], use_cache=False).logits.numpy().astype(np.float32)[0, 8:]
        chosen = logits[np.arange(8), sequence[0, 9:]]
        # bfloat16 has 8 bits, and the two computations round in different orders.
        assert (chosen >= logits.max(-1) - 0.02 * np.abs(logits).max()).all()

    def test_chunked_prefill_inside_a_tf_function_raises(self, pair: Pair) -> None:
        model = pair(NAME)[1]
        run = tf.function(lambda ids: model.generate(ids, prefill_chunk_size=6, **OPTIONS), autograph=False)
        with pytest.raises(ValueError, match="prefill_chunk_size is not supported inside"):
            run(tf.constant(ids_of(1, 23)))

    def test_generator_of_another_framework_raises(self, pair: Pair) -> None:
        with pytest.raises(TypeError, match=r"generator must be a tf\.random\.Generator, got Generator"):
            pair(NAME)[1].generate(ids_of(1, 7), generator=torch.Generator(), **OPTIONS)
