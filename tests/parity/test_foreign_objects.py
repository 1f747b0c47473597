"""transformers' objects passed to our models: generation configs, processors, criteria, streamers, caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_families
import torch
import transformers
from tiny_families import model_inputs, pair

import monoblock
from monoblock import GenerationConfig
from monoblock.generation.config import as_own_config

MODELS = ("MistralForCausalLM", "GPTNeoForCausalLM")
ATOL = 1e-5  # float32, 3 layers, values of about 1; as in the parity tests of the families


def ids_of(name: str, tokens: int = 23) -> torch.Tensor:
    return model_inputs(name, "none")[0][:1, :tokens]


# ---------------------------------------------------------------------------- generation configs


def test_generation_configs_are_converted_by_their_set_fields() -> None:
    theirs = transformers.GenerationConfig(
        max_new_tokens=5, do_sample=True, temperature=0.5, eos_token_id=[7, 8], sequence_bias={(1, 2): 3.0}
    )
    ours = as_own_config(theirs)
    assert isinstance(ours, GenerationConfig)
    assert (ours.max_new_tokens, ours.temperature, ours.eos_token_id) == (5, 0.5, [7, 8])
    assert ours.own_fields().keys() >= {"max_new_tokens", "do_sample", "temperature"}, "set explicitly"
    assert "transformers_version" not in vars(ours)
    assert as_own_config(None) is None and as_own_config(ours) is ours
    for wrong in ({"max_new_tokens": 5}, 3, transformers.MistralConfig()):
        with pytest.raises(ValueError, match=f"must be a GenerationConfig.*got {type(wrong).__name__}"):
            as_own_config(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_generate_accepts_a_generation_config(name: str) -> None:
    theirs, ours = pair(name)
    config = transformers.GenerationConfig(
        max_new_tokens=7, repetition_penalty=1.7, no_repeat_ngram_size=2, pad_token_id=0, eos_token_id=88
    )
    wanted = theirs.generate(ids_of(name), generation_config=copy.deepcopy(config))
    assert torch.equal(ours.generate(ids_of(name), generation_config=config), wanted)
    mine = copy.copy(ours)
    mine.generation_config = config
    assert torch.equal(mine.generate(ids_of(name)), wanted)


def test_unsupported_fields_of_a_generation_config_raise() -> None:
    _, ours = pair("MistralForCausalLM")
    config = transformers.GenerationConfig(max_new_tokens=2, token_healing=True)
    with pytest.raises(ValueError, match="token_healing=True"):
        ours.generate(ids_of("MistralForCausalLM"), generation_config=config)
    with pytest.raises(ValueError, match=r"generation_config must be a GenerationConfig.*got dict"):
        ours.generate(ids_of("MistralForCausalLM"), generation_config={"max_new_tokens": 2})


# ---------------------------------------------------------------------------- processors, criteria, streamers


@pytest.mark.parametrize("name", MODELS)
def test_processors_and_criteria(name: str) -> None:
    theirs, ours = pair(name)

    class Ban(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, input_ids[0, -4:], float("-inf"))

    given: dict[str, Any] = {
        "logits_processor": transformers.LogitsProcessorList(
            [
                Ban(),
                transformers.MinNewTokensLengthLogitsProcessor(23, 3, 5),
                transformers.NoRepeatNGramLogitsProcessor(2),
            ]
        ),
        "stopping_criteria": transformers.StoppingCriteriaList(
            [transformers.MaxLengthCriteria(max_length=30), transformers.MaxTimeCriteria(max_time=600)]
        ),
        "max_new_tokens": 20,
        "do_sample": False,
    }
    wanted = theirs.generate(ids_of(name), **given, pad_token_id=0)
    found = ours.generate(ids_of(name), **given, pad_token_id=0)
    assert torch.equal(found, wanted)
    assert found.shape[1] == 30, "the criterion stops, not max_new_tokens"


def test_streamers() -> None:
    _, ours = pair("GPTNeoForCausalLM")

    class Seen(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    seen = Seen()
    made = ours.generate(ids_of("GPTNeoForCausalLM"), max_new_tokens=4, streamer=seen)
    assert seen.ids == [*made[0].tolist(), -1]


# ---------------------------------------------------------------------------- caches


def caches(name: str) -> list[Any]:
    theirs, ours = pair(name)
    plain = [transformers.DynamicCache(), transformers.DynamicCache(config=theirs.config)]
    return [*plain, transformers.DynamicCache(config=ours.config)]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["plain", "their config", "our config"])
@pytest.mark.parametrize("name", MODELS)
def test_caches_are_read_and_updated_in_place(name: str, kind: int) -> None:
    """Three calls with one cache object of transformers, past Mistral's window of 9 tokens: outputs and the contents of
    the cache equal those in transformers."""
    theirs, ours = pair(name)
    ids, here, there = ids_of(name), caches(name)[kind], caches(name)[kind]
    for first, last in ((0, 5), (5, 20), (20, 23)):
        with torch.no_grad():
            wanted = theirs(ids[:, first:last], past_key_values=there, use_cache=True)
            found = ours(ids[:, first:last], past_key_values=here)
        assert found.past_key_values is here
        assert torch.allclose(found.logits, wanted.logits, atol=ATOL)
        assert here.get_seq_length() == there.get_seq_length() == last
        for (key, value, *_), (key_there, value_there, *_) in zip(here, there, strict=True):
            assert torch.allclose(key, key_there, atol=ATOL) and torch.allclose(value, value_there, atol=ATOL)
    with torch.no_grad():  # transformers can continue with it
        more = ids[:, :2]
        assert torch.allclose(
            theirs(more, past_key_values=here).logits, theirs(more, past_key_values=there).logits, atol=ATOL
        )


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "their config"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_continues_a_cache(name: str, kind: int) -> None:
    theirs, ours = pair(name)
    ids, here, there = ids_of(name), caches(name)[kind], caches(name)[kind]
    with torch.no_grad():
        theirs(ids[:, :20], past_key_values=here, use_cache=True)
        theirs(ids[:, :20], past_key_values=there, use_cache=True)
    wanted = theirs.generate(ids, past_key_values=there, max_new_tokens=6, pad_token_id=0)
    assert torch.equal(ours.generate(ids, past_key_values=here, max_new_tokens=6), wanted)
    assert here.get_seq_length() == there.get_seq_length() == 28
    assert torch.allclose(here.layers[0].keys, there.layers[0].keys, atol=ATOL)


def test_gradients_reach_a_given_cache() -> None:
    """As prefix tuning needs: its keys and values are parameters."""
    theirs, ours = pair("MistralForCausalLM")
    ids = ids_of("MistralForCausalLM", 6)
    grads = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        heads = model.config.num_key_value_heads
        past = [torch.randn(2, 1, heads, 3, model.config.head_dim, requires_grad=True) for _ in range(3)]
        cache = transformers.DynamicCache([(layer[0], layer[1]) for layer in past])
        mask = torch.ones(1, 9, dtype=torch.long)
        model(ids, past_key_values=cache, attention_mask=mask, labels=ids).loss.backward()
        grads.append([layer.grad for layer in past])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert a.abs().max() > 0 and torch.allclose(a, b, atol=ATOL)


def test_incompatible_caches_raise() -> None:
    theirs, ours = pair("MistralForCausalLM")
    ids = ids_of("MistralForCausalLM")
    static = transformers.StaticCache(config=theirs.config, max_cache_len=40)
    with pytest.raises(ValueError, match=r"transformers' StaticCache.*monoblock"):
        ours(ids, past_key_values=static)
    with pytest.raises(ValueError, match="transformers' StaticCache"):
        ours.generate(ids, past_key_values=static, max_new_tokens=2)
    short = copy.deepcopy(theirs.config)
    short.sliding_window = 5
    cut = transformers.DynamicCache(config=short)
    keys = torch.zeros(1, theirs.config.num_key_value_heads, 12, theirs.config.head_dim)
    for layer in range(3):
        cut.update(keys, keys, layer)
    with pytest.raises(
        ValueError, match="has kept 4 of 12 tokens in layer 0, where a token of this model attends to 9"
    ):
        ours(ids, past_key_values=cut)
    few = transformers.DynamicCache([(keys, keys)])
    with pytest.raises(ValueError, match="has 1 layers, but the model has 3"):
        ours(ids, past_key_values=few)
    with pytest.raises(ValueError, match="must be a Cache or a tuple of layers, got int"):
        ours(ids, past_key_values=3)


# ---------------------------------------------------------------------------- the other frameworks


def test_flax_generates_by_a_generation_config() -> None:
    config = tiny_families.family_of("GPTNeoForCausalLM").config(**tiny_families.fields("gpt_neo"))
    model = monoblock.FlaxGPTNeoForCausalLM(config)
    ids = ids_of("GPTNeoForCausalLM", 5).numpy()
    theirs = transformers.GenerationConfig(max_new_tokens=3, repetition_penalty=1.7, pad_token_id=0)
    wanted = model.generate(ids, max_new_tokens=3, repetition_penalty=1.7, pad_token_id=0)
    found = model.generate(ids, generation_config=theirs)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    with pytest.raises(ValueError, match=r"generation_config must be a GenerationConfig.*got str"):
        model.generate(ids, generation_config="greedy")
