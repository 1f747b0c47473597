"""Caches of TF models: tuples, growing and static `Cache`s with rolling windows, eagerly and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from contract.models import inputs, numpy
from measure import assert_close
from tf_pairs import close, model, pair, rounding_bound
from tiny_families import GENERATING

from monoblock.backends.tf.cache import Cache, init_cache
from monoblock.backends.xla.inputs import ForwardOptions

CAUSAL = ("MptForCausalLM", *GENERATING)
ROOM = 30


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_chunks_with_a_cache_equal_one_pass(name: str, padding: str, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    given = inputs(name, padding)
    ids, mask = given["input_ids"].numpy(), given.get("attention_mask")
    with torch.no_grad():
        out = theirs(**given, output_hidden_states=True)
    expected, bound = out.logits, rounding_bound(theirs, out)
    kinds = {
        "tuples": None,
        "growing": init_cache(ours.spec, len(ids), None),
        "static": init_cache(ours.spec, len(ids), ROOM),
    }
    for kind, past in kinds.items():
        start, logits = 0, []
        for count in (14, 1, 1, 4, 1, 2):
            stop = start + count
            visible = None if mask is None else mask[:, :stop].numpy()
            out = ours(ids[:, start:stop], attention_mask=visible, past_key_values=past, use_cache=True)
            past, start = out.past_key_values, stop
            assert isinstance(past, tuple if kind == "tuples" else Cache)
            logits.append(out.logits)
        close(f"{name}, {padding}, {kind}", tf.concat(logits, 1), expected, bound, mask)
    assert isinstance(past, Cache)
    assert int(past.get_seq_length()) == 23
    windows = {layer.shape[2] for layer in past.keys}
    assert windows == {min(ROOM, window or ROOM) for window in ours.spec.windows}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM"])
def test_compiled_loop_with_a_static_cache(name: str, compiled: bool) -> None:
    """As generation does: a prompt longer than the windows, then one token per step in a `tf.while_loop`."""
    ours = model(name)
    given = numpy(inputs(name, "left"))
    ids, mask = given["input_ids"].astype(np.int32), given["attention_mask"].astype(np.int32)
    prompt, rows = 16, len(ids)
    whole = np.pad(mask, ((0, 0), (0, ROOM - mask.shape[1])))

    @tf.function(jit_compile=True, autograph=False)
    def run(ids: Any, mask: Any) -> Any:
        cache = init_cache(ours.spec, rows, ROOM, compiled=compiled)
        first = {"input_ids": ids[:, :prompt], "attention_mask": mask}
        out = ours.network(first, cache, ForwardOptions(keep=1))
        cache = out["past_key_values"]

        def step(i: Any, written: Any, *tensors: Any) -> Any:
            now = {"input_ids": tf.slice(ids, (0, i), (rows, 1)), "attention_mask": mask}
            out = ours.network(now, cache.with_tensors(tensors), ForwardOptions(fresh=False))
            written = written.write(i - prompt, out["logits"][:, 0])
            return (i + 1, written, *out["past_key_values"].tensors())

        count = ids.shape[1] - prompt
        written = tf.TensorArray(tf.float32, count, element_shape=(rows, ours.spec.vocab))
        state = (tf.constant(prompt), written, *cache.tensors())
        end = tf.while_loop(lambda i, *_: i < prompt + count, step, state)
        return out["logits"], tf.transpose(end[1].stack(), (1, 0, 2))

    first, rest = run(tf.constant(ids), tf.constant(whole))
    expected = ours(**given, use_cache=False).logits
    assert_close(f"{name}, compiled", tf.concat((first, rest), 1), expected[:, prompt - 1 :], 5e-5)


def test_reordered_rows_of_a_cache() -> None:
    ours = model("MistralForCausalLM")
    ids = numpy(inputs("MistralForCausalLM"))["input_ids"]
    cache = ours(ids[:, :20], past_key_values=init_cache(ours.spec, 3, ROOM)).past_key_values
    reordered = cache.reorder(tf.constant([2, 0]))
    after = ours(ids[[2, 0], 20:], past_key_values=reordered).logits
    assert_close("reordered", after, ours(ids, use_cache=False).logits.numpy()[[2, 0], 20:], 1e-5)


def test_caches_as_arguments_and_results_of_a_graph() -> None:
    ours = model("MistralForCausalLM")
    ids = numpy(inputs("MistralForCausalLM"))["input_ids"]

    @tf.function(autograph=False)
    def step(ids: Any, cache: Cache) -> Any:
        return ours(ids, past_key_values=cache)

    out = step(ids[:, :20], init_cache(ours.spec, 3, ROOM))
    assert isinstance(out.past_key_values, Cache)
    assert out.past_key_values.max_length == ROOM
    last = step(ids[:, 20:], out.past_key_values).logits
    assert_close("in a graph", last, ours(ids, use_cache=False).logits[:, 20:], 2e-5)


def test_a_bidirectional_model_has_no_cache() -> None:
    with pytest.raises(ValueError, match="a bidirectional model has no cache"):
        model("MPNetModel")(np.full((2, 4), 5), use_cache=True)
