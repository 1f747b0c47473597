"""Speculative decoding against transformers' greedy decoding, in every causal family."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import PAD, batch  # noqa: E402
from test_beams_parity import mpt_pair  # noqa: E402
from tiny_families import GENERATING, VOCAB, pair  # noqa: E402

NAMES = ("MptForCausalLM", *GENERATING)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, {"bad_words_ids": [[11], [12, 13]]}],
    ids=str,
)
def test_speculative_tokens_are_transformers_greedy_tokens(name, fields):
    theirs, ours = mpt_pair() if name == "MptForCausalLM" else pair(name)
    theirs.generation_config = transformers.GenerationConfig()
    for seed in range(3):
        ids, _ = batch("none", (9,), VOCAB, seed, low=10)
        options = {
            "eos_token_id": [2, 17],
            "pad_token_id": PAD,
            "max_new_tokens": 20,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
            **fields,
        }
        with torch.no_grad():
            expected = theirs.generate(ids, **options).tolist()
        assert ours.generate(ids, **options).tolist() == expected
        assert ours.generate(ids, **options, prompt_lookup_num_tokens=5).tolist() == expected
        assert ours.generate(ids, **options, assistant_model=ours).tolist() == expected


def test_prompt_lookup_equals_transformers():
    theirs, ours = pair("MistralForCausalLM")
    theirs.generation_config = transformers.GenerationConfig()
    ids, _ = batch("none", (9,), VOCAB, 7, low=10)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 2}
    options["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        expected = theirs.generate(ids, **options, prompt_lookup_num_tokens=3).tolist()
    assert ours.generate(ids, **options, prompt_lookup_num_tokens=3).tolist() == expected
