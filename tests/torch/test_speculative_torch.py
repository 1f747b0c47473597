"""Speculative decoding on real caches: greedy tokens equal plain decoding's, in every family that generates."""

import numpy as np
import pytest
import torch
from helpers import model as mpt_model
from tiny_families import CLASSES, GENERATING, fields, monoblock_model

from monoblock import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MptForCausalLM,
    TextStreamer,
    demo,
    native,
)
from monoblock.backends.pytorch.generation import decoder as decoding
from monoblock.generation import loop
from monoblock.generation.draft_rule import DraftRule

NAMES = ("MptForCausalLM", *GENERATING)
LOOKUP = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3}
SUFFIX = {"speculation": "suffix"}
# Random models are rarely sure of anything: without a threshold of 0 every draft would be of one token.
DRAFTED = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}


def pair(name):
    """A model, and one of the same family and vocabulary that differs a little."""
    if name == "MptForCausalLM":
        made = [mpt_model(name, seed=0), mpt_model(name, seed=0)]
    else:
        made = [monoblock_model(name, **fields(CLASSES[name])) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made[1].parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return made


def prompts(vocab, count=6):
    generator = torch.Generator().manual_seed(5)
    for i in range(count):
        ids = torch.randint(10, vocab, (1, 4 + 3 * i), generator=generator)
        yield torch.cat((ids, ids[:, :3]), dim=1)  # a repetition to look up


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_plain_decoding(name, monkeypatch):
    monkeypatch.setattr(DraftRule, "lengths", lambda _, drafts, *__: [len(d.tokens) for d in drafts])
    model, helper = pair(name)
    windowed = any(window is not None for window in model.spec.windows)
    options = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 3, "do_sample": False}
    for ids in prompts(model.spec.vocab):
        plain = model.generate(ids, **options).tolist()
        for more in (LOOKUP, SUFFIX, {"assistant_model": helper, **DRAFTED}, {**LOOKUP, "use_cache": False}):
            assert model.generate(ids, **options, **more).tolist() == plain, (windowed, more)


def test_static_cache_and_padded_prompt():
    model, helper = pair("MptForCausalLM")
    ids = torch.tensor([[3, 3, 10, 20, 30, 10, 20]])
    mask = (ids != 3).long()
    options = {"max_new_tokens": 25, "eos_token_id": None, "attention_mask": mask}
    plain = model.generate(ids, **options).tolist()
    for more in (LOOKUP, {"assistant_model": helper, **DRAFTED}):
        for kind in ("dynamic", "static"):
            got = model.generate(ids, **options, **more, cache_implementation=kind)
            assert got.tolist() == plain


def test_returned_cache_equals_plain_decoding():
    model, _ = pair("MptForCausalLM")
    ids = next(iter(prompts(89)))
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "eos_token_id": None}
    wanted = {**options, "output_hidden_states": True, "output_attentions": True, "output_scores": True}
    plain, speculative = model.generate(ids, **wanted), model.generate(ids, **wanted, **LOOKUP)
    assert speculative.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(speculative, name), getattr(plain, name), strict=True):
            for mine, expected in zip(ours, theirs, strict=True):
                assert mine.shape == expected.shape
                torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)  # 30 float32 products apart
    more = model.generate(
        speculative.sequences,
        past_key_values=speculative.past_key_values,
        max_new_tokens=5,
        eos_token_id=None,
    )
    assert more.tolist() == model.generate(ids, max_new_tokens=17, eos_token_id=None).tolist()


@pytest.fixture(scope="module")
def demo_model():
    return MptForCausalLM.from_pretrained(demo.path(), dtype=torch.float32), AutoTokenizer.from_pretrained(
        demo.path()
    )


PROMPTS = [
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\n\ndef main(argv):\n    parser =",
    'for name in sorted(names):\n    print("%s" % name)\nfor name in',
    "    def test_one(self):\n        self.assertEqual(one(), 1)\n\n    def test_two(self):\n",
    '"""A module."""\n\n__all__ = [',
    "try:\n    import json\nexcept ImportError:\n    json = None\n\ntry:\n    import",
    "x = {1: 'a', 2: 'b', 3:",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_demo_model(demo_model, prompt):
    model, tokenizer = demo_model
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 60, "do_sample": False}
    plain = model.generate(ids, **options).tolist()
    assert model.generate(ids, **options, prompt_lookup_num_tokens=10).tolist() == plain
    for method in ("suffix", "lookup"):
        assert model.generate(ids, **options, speculation=method).tolist() == plain
    assert model.generate(ids, **options, assistant_model=model).tolist() == plain


def test_sampling_with_a_seed_and_a_streamer(demo_model, capsys):
    model, tokenizer = demo_model
    inputs = tokenizer("def f(x):\n    return x\n\ndef g(x):\n    return", return_tensors="pt")
    options = {"max_new_tokens": 25, "do_sample": True, "seed": 1, "temperature": 0.7}
    plain = model.generate(inputs, **options)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    speculative = model.generate(inputs, **options, prompt_lookup_num_tokens=6, streamer=streamer)
    assert speculative.tolist() == plain.tolist()
    new = speculative[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == tokenizer.decode(new).strip()


def test_sampling_from_an_assistant_has_the_models_distribution():
    """The first two tokens of a model of a vocabulary of 9, drawn by way of another model of it."""
    sizes = {"vocab_size": 9, "pad_token_id": 0, "d_model": 12, "n_heads": 3}
    model, helper = (mpt_model(seed=seed, **sizes) for seed in (0, 1))
    ids, draws = torch.tensor([[4, 5, 6]]), 700
    with torch.inference_mode():
        first = model(ids).logits[0, -1].softmax(-1)
        after = [
            model(torch.cat((ids, torch.tensor([[t]])), dim=1)).logits[0, -1].softmax(-1) for t in range(9)
        ]
    expected = (first[:, None] * torch.stack(after)).double().numpy().ravel()
    counts = np.zeros(81)
    generator = torch.Generator().manual_seed(2)
    options = {
        "max_new_tokens": 3,
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": None,
        "generator": generator,
    }
    options |= {"assistant_model": helper, **DRAFTED}
    for _ in range(draws):
        # The prompt's pass gives the first token, a guess the second; the last one is never drafted.
        one, two, _ = model.generate(ids, **options)[0, 3:].tolist()
        counts[9 * one + two] += 1
    cells = expected * draws >= 5
    observed = np.append(counts[cells], counts[~cells].sum())
    wanted = np.append(expected[cells], expected[~cells].sum()) * draws
    free = len(observed) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < free + 4 * np.sqrt(2 * free)


def test_an_assistant_of_another_library_raises():
    model, _ = pair("MptForCausalLM")
    with pytest.raises(TypeError, match=r"one of monoblock's \.\.\.ForCausalLM models, got Linear"):
        model.generate(torch.tensor([[5]]), assistant_model=torch.nn.Linear(2, 2))


def test_long_rejected_drafts_with_windowed_caches():
    """A window of 9: the cache drops what is older than 8 + 64 tokens once it holds twice as many."""
    model, helper = pair("MistralForCausalLM")
    ids = next(iter(prompts(model.spec.vocab)))
    options = {"max_new_tokens": 250, "eos_token_id": None, "no_repeat_ngram_size": 4}
    plain = model.generate(ids, **options).tolist()
    assert model.generate(ids, **options, prompt_lookup_num_tokens=100).tolist() == plain
    drafted = {"assistant_model": helper, **DRAFTED, "num_assistant_tokens": 100}
    assert model.generate(ids, **options, **drafted).tolist() == plain


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "lossless"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verified_tokens_have_the_bits_of_single_steps(dtype, quantization):
    """With every format of weights; more tokens than a native step takes, too."""
    if native.library() is None or (dtype, quantization) == ("float32", "lossless"):
        pytest.skip("the native step does not run")
    more = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=dtype, **more)
    ids = torch.tensor([[token % 97 + 20 for token in range(70)]])
    with torch.inference_mode():
        scores = []
        for counts in ([1] * 40, [2, 3, 16, 19], [40]):
            plan = loop.GenerationPlan(
                config=GenerationConfig(use_cache=True),
                prompt_length=30,
                new_tokens=41,
                batch=1,
                copies=1,
                rewinds=True,
            )
            decoder = decoding.CachedDecoder(model, plan, {})
            decoder.prefill(ids[:, :30], None)
            if counts == [1] * 40:  # as without drafts
                decoder.verifies = False
            parts = ids[:, 30:].split(counts, dim=1)
            scores.append(torch.cat([decoder.extend(part) for part in parts], dim=1))
            assert decoder.steps is not None
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
