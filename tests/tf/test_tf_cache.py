"""Caches of TF models: tuples and `Cache`s that grow, static ones with windows that roll, eagerly and compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from measure import assert_close
from tf_pairs import close, inputs, model, numpy, pair, rounding_bound
from tiny_families import GENERATING

from monoblock.backends.tf.cache import Cache, init_cache
from monoblock.backends.xla.inputs import ForwardOptions

CAUSAL = ("MptForCausalLM", *GENERATING)
ROOM = 30


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_pieces_give_what_the_whole_gives(name: str, padding: str, tmp_path: Path) -> None:
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
            seen = None if mask is None else mask[:, :stop].numpy()
            out = ours(ids[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True)
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
def test_a_compiled_loop_over_a_static_cache(name: str, compiled: bool) -> None:
    """What generation does: a prompt that fills windows over, then one token after the other in a `tf.while_loop`."""
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


def test_rows_of_a_cache() -> None:
    ours = model("MistralForCausalLM")
    ids = numpy(inputs("MistralForCausalLM"))["input_ids"]
    cache = ours(ids[:, :20], past_key_values=init_cache(ours.spec, 3, ROOM)).past_key_values
    turned = cache.reorder(tf.constant([2, 0]))
    after = ours(ids[[2, 0], 20:], past_key_values=turned).logits
    assert_close("reordered", after, ours(ids, use_cache=False).logits.numpy()[[2, 0], 20:], 1e-5)


def test_a_cache_goes_into_and_out_of_a_graph() -> None:
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


def test_what_does_not_fit_is_refused() -> None:
    ours = model("MistralForCausalLM")
    ids = np.full((2, 4), 5)
    full = init_cache(ours.spec, 2, 6)
    with pytest.raises(ValueError, match="2 rows, and the input has 1"):
        ours(ids[:1], past_key_values=full)
    half = ours(ids, past_key_values=full).past_key_values
    with pytest.raises(ValueError, match="room for 6 tokens: 4 are cached and the input has 4"):
        ours(ids, past_key_values=half)
    with pytest.raises(ValueError, match="2 layers, got 1"):
        ours(ids, past_key_values=replace(full, keys=full.keys[:1], values=full.values[:1]))
    with pytest.raises(ValueError, match="keys and values"):
        ours(ids, past_key_values=((ids, ids),) * 2)
    with pytest.raises(ValueError, match=r"cached tokens included, got \(2, 4\)"):
        ours(ids, past_key_values=ours(ids).past_key_values, attention_mask=np.ones((2, 4)))
    with pytest.raises(ValueError, match="a bidirectional model has no cache"):
        model("MPNetModel")(ids, use_cache=True)
