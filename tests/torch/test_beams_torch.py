"""Beam search with every kind of cache and prompt: the same sequences."""

import copy

import pytest
import torch
from helpers import batch
from helpers import model as mpt_model
from tiny_families import CLASSES, GENERATING, fields, monoblock_model

NAMES = ("MptForCausalLM", *GENERATING)
OPTIONS = {
    "num_beams": 4,
    "num_return_sequences": 3,
    "max_new_tokens": 14,
    "eos_token_id": [2, 17, 30],
    "pad_token_id": 3,
    "do_sample": False,
}


def made(name):
    return mpt_model() if name == "MptForCausalLM" else monoblock_model(name, **fields(CLASSES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_caches_and_embeddings(name):
    model = made(name)
    ids, mask = batch("left", (11, 5, 8), 89, 1, low=10)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS).tolist()
    for more in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert model.generate(ids, attention_mask=mask, **OPTIONS, **more).tolist() == expected
    embeds = model.get_input_embeddings()(ids).detach()
    new = model.generate(inputs_embeds=embeds, attention_mask=mask, **OPTIONS).tolist()
    assert new == [row[11:] for row in expected]


@pytest.mark.parametrize("name", NAMES)
def test_padded_prompts_equal_single_prompts(name):
    model = made(name)
    ids, mask = batch("left", (11, 5, 8), 89, 2, low=10)
    together = model.generate(ids, attention_mask=mask, **OPTIONS).tolist()
    for row, length in enumerate((11, 5, 8)):
        alone = model.generate(ids[row : row + 1, -length:], **OPTIONS).tolist()
        for mine, theirs in zip(together[3 * row : 3 * row + 3], alone, strict=True):
            assert mine[11 - length :][: len(theirs)] == theirs
            assert set(mine[11 - length :][len(theirs) :]) <= {3}


def test_given_cache_of_a_prefix():
    model = made("MistralForCausalLM")
    ids, _ = batch("none", (12,), 89, 3, low=10)
    first = model.generate(ids[:, :8], max_new_tokens=1, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    got = model.generate(ids, past_key_values=cache, **OPTIONS)
    assert got.tolist() == model.generate(ids, **OPTIONS).tolist()


def test_beams_longer_than_a_windowed_cache():
    model = made("MistralForCausalLM")
    ids, _ = batch("none", (12,), 89, 3, low=10)
    options = {**OPTIONS, "max_new_tokens": 170, "eos_token_id": None, "no_repeat_ngram_size": 3}
    got = model.generate(ids, **options)
    with torch.inference_mode():
        assert got.tolist() == model.generate(ids, **options, use_cache=False).tolist()
