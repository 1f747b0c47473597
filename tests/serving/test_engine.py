"""The engine: every answer is that of the request alone, whatever shares the batch; limits, stops, penalties, log
probabilities, structured output, drafts; nothing is left behind."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import fuyu_tokenizer
import numpy as np
import pytest
import torch
from helpers import randomised
from PIL import Image
from serving_models import CLASSES, LENGTH, Answer, engine, model, prompt_of, run, tokenizer
from tiny_families import MODEL_TYPES, fields, monoblock_model
from tiny_lora import adapt

import monoblock
from monoblock import native
from monoblock.generation import draft_rule
from monoblock.generation.batches import BLOCK
from monoblock.generation.draft_rule import DraftRule
from monoblock.generation.drafts import METHODS
from monoblock.serving.engine.engine import Engine
from monoblock.serving.engine.loading import make_engine
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import QueueFull

REQUESTS = int(os.environ.get("MONOBLOCK_TEST_REQUESTS", "40"))
SCHEMA = {
    "type": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def requests_of(seed: int, count: int, longest: int = 40) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of mixed lengths, many with a common beginning; greedy and sampled; stops, schemas, drafts."""
    rng = np.random.default_rng(seed)
    systems = [prompt_of(rng, length) for length in (BLOCK + 9, 2 * BLOCK + 1)]
    found: list[tuple[list[int], SamplingParams]] = []
    for index in range(count):
        prompt = prompt_of(rng, int(rng.integers(1, 100)))
        if rng.random() < 0.5:
            prompt = systems[int(rng.integers(0, 2))] + prompt[: int(rng.integers(1, 20))]
        new = int(rng.integers(1, longest))
        options: dict[str, Any] = {"max_tokens": new, "temperature": 0, "seed": index}
        match index % 5:
            case 0:
                options |= {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "presence_penalty": 0.4}
            case 1:
                options |= {"n": 2, "temperature": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.1}
            case 2:
                options |= {"stop": ["a", "the"], "speculative_tokens": 4, "min_tokens": min(3, new)}
            case 3:
                options |= {"response_format": SCHEMA, "max_tokens": 30}
            case _:
                options |= {"speculative_tokens": 3, "logit_bias": {5: 3.0}}
        found.append((prompt, SamplingParams(**options)))
    return found


def together(
    core: Engine, requests: list[tuple[list[int], SamplingParams]], seed: int
) -> list[Answer | None]:
    """All requests, arriving at random steps and in bursts; some are cancelled (None)."""
    rng = np.random.default_rng(seed)
    left = list(range(len(requests)))
    answers: list[Answer | None] = [None] * len(requests)
    running: dict[int, Any] = {}
    while left or core.busy:
        burst = int(rng.integers(4, 12)) if rng.random() < 0.1 else int(rng.poisson(0.4))
        for _ in range(min(burst, len(left))):
            index = left.pop(0)
            prompt, params = requests[index]
            answers[index] = answer = Answer(params)
            running[index] = core.add(prompt, params, sink=answer)
        if running and rng.random() < 0.03:
            index = int(rng.choice(list(running)))
            core.cancel(running.pop(index))
            answers[index] = None
        core.step()
        for index in [index for index, request in running.items() if request.done]:
            request = running.pop(index)
            assert request.error is None, request.error
    return answers


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {"max_step_tokens": 48}),
        ("float32", {"prefix_cache": False, "max_sequences": 7}),
        ("bfloat16", {"blocks": 6}),
        ("float32", {"speculation": "suffix"}),
        ("bfloat16", {"speculation": "suffix", "speculation_cache": 600, "blocks": 6}),
    ],
    ids=["float32", "bfloat16", "without prefix cache", "preemption", "drafts", "drafts and preemption"],
)
def test_every_answer_is_that_of_the_request_alone(
    name: str, dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the token, for random arrivals, all families, a cache that is too small for all, and drafts of any length."""
    if native.library() is None and dtype == "bfloat16":
        pytest.skip("without native kernels bfloat16 depends on how a prompt is divided")
    seed = sum(map(ord, name))
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(
        DraftRule, "lengths", lambda _, drafts, *__: [int(rng.integers(0, len(d.tokens) + 1)) for d in drafts]
    )
    requests = requests_of(seed, REQUESTS, 100 if "blocks" in options else 40)
    core = engine(name, dtype, **options)
    answers = together(core, requests, seed)
    assert sum(answer is not None for answer in answers) > REQUESTS // 2
    for answer, (prompt, params) in zip(answers, requests, strict=True):
        if answer is not None:
            plain = params.replaced(speculative_tokens=0)
            assert answer.result == run(engine(name, dtype, prefix_cache=False), prompt, plain).result
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.cache_used) == (0, 0, 0)
    if native.library() is not None:
        assert bool(stats.preemptions) == ("blocks" in options)
        if "prefix_cache" not in options:
            assert stats.prefix_hit_tokens > 0
        if "speculation" in options:
            assert 0 < stats.accepted_tokens < stats.draft_tokens
            assert core.drafting.index is not None
            assert 0 < core.drafting.index.tokens <= core.options.speculation_cache


@pytest.mark.parametrize("name", CLASSES)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    """float32; beyond every window."""
    prompt = prompt_of(np.random.default_rng(3), 90)
    found = run(engine(name), prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)).result[
        0
    ][0]
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": -1}
    wanted = model(name).generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert found == wanted


def test_a_seed_gives_the_draws_of_generate() -> None:
    prompt = prompt_of(np.random.default_rng(4), 20)
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.8, seed=11, max_tokens=30, ignore_eos=True)
    found = run(engine("MistralForCausalLM"), prompt, params).result[0][0]
    options = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.8, "seed": 11}
    wanted = model("MistralForCausalLM").generate(
        torch.tensor([prompt]), **options, max_new_tokens=30, eos_token_id=-1
    )
    assert found == wanted[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------- parameters


def test_stop_strings_and_what_is_held_back() -> None:
    core = engine("MptForCausalLM")
    prompt = prompt_of(np.random.default_rng(5), 10)
    whole = run(core, prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    text = whole.completions[0].text
    assert "".join(delta.text for delta in whole.deltas) == text
    assert len(whole.deltas) > 10  # it streams
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = text[: text.index(stop)]
    stopped = run(
        core, prompt, SamplingParams(temperature=0, max_tokens=40, stop=[stop, "\0\0"], ignore_eos=True)
    )
    assert stopped.result[0][1:] == (cut, "stop", stop)
    assert "".join(delta.text for delta in stopped.deltas) == cut
    kept = run(
        core,
        prompt,
        SamplingParams(
            temperature=0, max_tokens=40, stop=stop, include_stop_str_in_output=True, ignore_eos=True
        ),
    )
    assert kept.result[0][1] == cut + stop


def test_stop_tokens_min_tokens_and_eos() -> None:
    core = engine("MptForCausalLM")
    prompt = prompt_of(np.random.default_rng(6), 10)
    tokens = run(core, prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)).result[0][0]
    stop = tokens[5]
    first = tokens.index(stop)
    found = run(
        core, prompt, SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    )
    assert (found.result[0][0], found.result[0][2:]) == (tokens[: first + 1], ("stop", stop))
    later = run(
        core,
        prompt,
        SamplingParams(
            temperature=0, max_tokens=20, stop_token_ids=[stop], min_tokens=first + 2, ignore_eos=True
        ),
    )
    assert len(later.result[0][0]) > first + 1
    eos = tokenizer().eos_token_id
    ended = run(core, prompt, SamplingParams(temperature=0, max_tokens=20, logit_bias={eos: 100.0}))
    assert ended.result == [([eos], "", "stop", None)]
    banned = run(
        core, prompt, SamplingParams(temperature=0, max_tokens=20, min_tokens=4, logit_bias={eos: 100.0})
    )
    assert len(banned.result[0][0]) == 5
    assert run(core, prompt, GREEDY).result[0][2] in ("length", "stop")


def test_log_probabilities_are_the_model_s() -> None:
    """Before penalties and temperature; of the prompt too."""
    core = engine("GPTNeoForCausalLM")
    prompt = prompt_of(np.random.default_rng(7), 80)
    params = SamplingParams(
        temperature=0.5,
        seed=1,
        max_tokens=9,
        logprobs=4,
        prompt_logprobs=2,
        presence_penalty=1.0,
        ignore_eos=True,
    )
    answer = Answer(params)
    request = core.add(prompt, params, sink=answer)
    while core.step():
        pass
    tokens = answer.completions[0].tokens
    with torch.no_grad():
        ids = torch.tensor([prompt + tokens])
        logs = model("GPTNeoForCausalLM")(input_ids=ids).logits[0].log_softmax(-1)
    for at, entry in enumerate(answer.completions[0].logprobs):
        row = logs[len(prompt) + at - 1]
        assert entry.token == tokens[at]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        values, indices = row.topk(4)
        assert [token for token, _ in entry.top] == indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert request.prompt_logprobs[0] is None
    assert len(request.prompt_logprobs) == len(prompt)
    for at, entry in enumerate(request.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.token == prompt[at]
        assert entry.logprob == pytest.approx(float(logs[at - 1, prompt[at]]), abs=1e-4)


def test_penalties_and_biases() -> None:
    core = engine("MptForCausalLM")
    prompt = prompt_of(np.random.default_rng(8), 10)
    plain = run(core, prompt, SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)).result[0][0]
    strong = run(
        core, prompt, SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, frequency_penalty=2.0)
    ).result[0][0]
    assert len(set(strong)) >= len(set(plain))
    biased = run(core, prompt, SamplingParams(temperature=0, max_tokens=5, logit_bias={7: 100.0})).result[0][
        0
    ]
    assert biased == [7] * 5
    own = run(
        core,
        prompt,
        SamplingParams(
            temperature=0, max_tokens=3, logits_processors=[lambda ids, x: x + 0 * ids[:, :1] - x]
        ),
    ).result[0][0]
    assert own == [0, 0, 0]  # equal scores: the first token
    field = SamplingParams(temperature=0, max_tokens=25, fields={"no_repeat_ngram_size": 1}, ignore_eos=True)
    assert len(set(run(core, prompt, field).result[0][0])) == 25


def test_structured_output() -> None:
    params = SamplingParams(temperature=1, seed=2, max_tokens=30, response_format=SCHEMA)
    for name in CLASSES:
        [(_, text, finish, _)] = run(engine(name), [5, 6], params).result
        assert finish == "stop"
        assert isinstance(json.loads(text)["a"], bool)


def test_best_of_and_n_share_the_prompt() -> None:
    core = engine("MistralForCausalLM")
    prompt = prompt_of(np.random.default_rng(9), 3 * BLOCK + 5)
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=6, n=4)
    texts = [text for _, text, *_ in run(core, prompt, params).result]
    assert len(set(texts)) > 1
    if native.library() is not None:
        assert core.stats().prefix_hit_tokens == 3 * 3 * BLOCK


@pytest.mark.skipif(native.library() is None, reason="without native kernels nothing is shared")
def test_a_second_turn_computes_its_new_tokens_only() -> None:
    """Blocks of generated tokens are reused too."""
    core = engine("MistralForCausalLM")
    prompt = prompt_of(np.random.default_rng(10), 2 * BLOCK - 10)
    reply = run(core, prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)).result[0][0]
    before = core.stats().prefix_hit_tokens
    turn = [*prompt, *reply, *prompt_of(np.random.default_rng(11), 8)]
    found = run(core, turn, GREEDY).result
    assert core.stats().prefix_hit_tokens - before == 2 * BLOCK
    assert found == run(engine("MistralForCausalLM", prefix_cache=False), turn, GREEDY).result


def test_drafts_save_steps() -> None:
    """A text that repeats itself: several tokens a step, the same as without."""
    core = engine("MptForCausalLM")
    bias = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={9: 100.0})
    run(core, [3, 4], bias)
    plain = core.stats().steps
    drafted = run(core, [3, 4], bias.replaced(speculative_tokens=8))
    assert drafted.result[0][0] == [9] * 60
    if native.library() is not None:
        assert core.stats().steps - plain < plain / 3


def timed(core: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, with a clock that only its steps advance: by 1, and by 0.02 for each token."""
    now, steps = [0.0], core.runner.run
    monkeypatch.setattr(draft_rule, "clock", lambda: now[0])

    def advance(chunks: Any) -> Any:
        now[0] += 1 + 0.02 * sum(len(chunk.tokens) for chunk in chunks)
        return steps(chunks)

    monkeypatch.setattr(core.runner, "run", advance)
    return core


@pytest.mark.parametrize("method", METHODS)
def test_rows_with_and_without_drafts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule over the rows of a step: fewer steps for what repeats itself, the same tokens for all."""
    if native.library() is None:
        pytest.skip("without native kernels there are no drafts")
    core = timed(engine("MptForCausalLM"), monkeypatch)
    bias = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, logit_bias={9: 100.0})
    sampled = SamplingParams(temperature=1.0, max_tokens=150, ignore_eos=True, seed=4)
    expected = [run(engine("MptForCausalLM"), [3, 4], params).result for params in (bias, sampled)]
    rows = [bias, sampled, bias.replaced(speculation=method), sampled.replaced(speculation=method)]
    answers = [Answer(params) for params in rows]
    requests = [core.add([3, 4], params, sink=answer) for params, answer in zip(rows, answers, strict=True)]
    steps = 0
    while not requests[2].done:
        core.step()
        steps += 1
    assert steps < 40
    while core.step():
        pass
    assert [answer.result for answer in answers] == expected * 2
    assert core.stats().accepted_tokens > 50


def test_earlier_requests_give_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request again: its tokens are in the index, not in its prompt. Without an index they are not."""
    if native.library() is None:
        pytest.skip("without native kernels there are no drafts")
    params = SamplingParams(temperature=1.0, max_tokens=120, ignore_eos=True, seed=4, speculation="suffix")
    prompt = prompt_of(np.random.default_rng(5), 30)
    accepted = []
    for size in (10_000, 0):
        core = timed(engine("MistralForCausalLM", speculation_cache=size), monkeypatch)
        first = run(core, prompt, params).result
        before = core.stats().accepted_tokens
        again = run(core, prompt, params).result
        assert first == again
        accepted.append(core.stats().accepted_tokens - before)
    assert accepted[0] > 60
    assert accepted[1] < 30


# ---------------------------------------------------------------------------- limits and errors


def test_limits() -> None:
    core = engine("OpenAIGPTLMHeadModel", max_waiting=3)
    assert core.max_model_len == LENGTH
    for prompt, params, match in (
        ([], GREEDY, "empty"),
        ([len(tokenizer())], GREEDY, "vocabulary"),
        ([1] * LENGTH, GREEDY, "shorten"),
        ([1] * (LENGTH - 3), GREEDY, "at most 3 can follow"),
        ([1], SamplingParams(fields={"num_beams": 2}), "num_beams"),
        ([1], SamplingParams(logit_bias={len(tokenizer()): 1.0}), "vocabulary"),
        ([1], SamplingParams(response_format={"type": "xml"}), "response_format"),
    ):
        with pytest.raises(ValueError, match=match):
            core.add(prompt, params, sink=print)
    with pytest.raises(QueueFull):
        core.add([1], GREEDY.replaced(n=4, temperature=1.0), sink=print)
    rest = run(core, [1] * (LENGTH - 3), GREEDY.replaced(max_tokens=None, ignore_eos=True))
    assert rest.result[0][2] == "length"
    assert len(rest.result[0][0]) == 3
    with pytest.raises(ValueError, match="max_model_len"):
        engine("OpenAIGPTLMHeadModel", max_model_len=LENGTH + 1)
    assert engine("MistralForCausalLM", max_model_len=50).max_model_len == 50


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"best_of": 1, "n": 2},
        {"logprobs": 21},
        {"stop": [""]},
        {"stop": ["a"] * 65},
        {"max_tokens": 2, "min_tokens": 3},
        {"logit_bias": {1: 101.0}},
        {"seed": "x"},
        {"presence_penalty": 3},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        SamplingParams(**wrong)


def test_an_error_of_one_request_is_its_own() -> None:
    core = engine("MptForCausalLM")

    def raises(ids: Any, scores: Any) -> Any:
        if ids.shape[1] > 6:
            raise RuntimeError("mine")
        return scores

    good, bad = Answer(GREEDY), Answer(GREEDY)
    request = core.add([1, 2, 3], GREEDY.replaced(logits_processors=[raises]), sink=bad)
    core.add([4, 5], GREEDY, sink=good)
    while core.step():
        pass
    assert str(request.error) == "mine"
    assert good.result == run(engine("MptForCausalLM"), [4, 5], GREEDY).result
    assert core.stats().cache_used == 0


def test_models_that_do_not_generate_are_refused() -> None:

    from monoblock.serving.engine.loading import make_engine

    encoder = monoblock_model("MPNetForMaskedLM", **fields(MODEL_TYPES["MPNetForMaskedLM"]))
    with pytest.raises(ValueError, match="does not generate"):
        make_engine(encoder, tokenizer())
    with pytest.raises(TypeError, match="model must be"):
        make_engine(object(), tokenizer())


# ---------------------------------------------------------------------------- images, adapters, other runners


def test_images() -> None:
    """The tokens of `generate`; a picture shares the blocks of the same picture only."""
    core = image_engine()
    pictures = [Image.new("RGB", (60, 60), color) for color in ("red", "blue")]
    found: list[list[int]] = []
    for picture in (pictures[0], pictures[1], pictures[0]):
        answer = Answer(GREEDY)
        core.add("what is in the box", GREEDY, image=picture, sink=answer)
        while core.step():
            pass
        found.append(answer.completions[0].tokens)
    wanted: list[list[int]] = []
    for picture in pictures:
        inputs = core.processor(text=["what is in the box"], images=[picture], return_tensors="pt")
        out = core.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        wanted.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    assert found == [wanted[0], wanted[1], wanted[0]]
    assert wanted[0] != wanted[1]
    with pytest.raises(TypeError, match="must be a text"):
        core.add([1], GREEDY, image=pictures[0], sink=print)


def image_engine() -> Engine:
    """A small Fuyu with its processor."""
    tokens = monoblock.PreTrainedTokenizerFast(
        tokenizer_object=fuyu_tokenizer.backend(), bos_token="<s>", eos_token="</s>", pad_token="|SPEAKER|"
    )
    images = monoblock.FuyuImageProcessor(patch_size={"height": 30, "width": 30})
    config = monoblock.FuyuConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_token_id=tokens.convert_tokens_to_ids("|SPEAKER|"),
        eos_token_id=2,
        pad_token_id=None,
    )
    vision = randomised(monoblock.FuyuForCausalLM(config).eval())
    processor = monoblock.FuyuProcessor(images, tokens)
    options = EngineOptions(cache_memory=1 << 25)
    return make_engine(vision, tokens, name="fuyu", processor=processor, options=options)


def test_adapters() -> None:
    """LoRA adapters are applied in the step; other sequences do not change the bits."""
    tuned = copy.deepcopy(model("MistralForCausalLM"))
    adapt(tuned, ["q_proj", "v_proj", "down_proj"], {"one": 3})
    core = make_engine(tuned, tokenizer(), options=EngineOptions(cache_memory=1 << 25))
    prompts = [prompt_of(np.random.default_rng(seed), 30 + seed) for seed in range(5)]
    params = GREEDY.replaced(ignore_eos=True)
    answers = [Answer(params) for _ in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        core.add(prompt, params, sink=answer)
    while core.step():
        pass
    if native.library() is not None:
        assert core.runner.why is None
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        wanted = tuned.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)[
            0, len(prompt) :
        ].tolist()
        assert answer.completions[0].tokens == wanted
        plain = model("MistralForCausalLM").generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert wanted != plain[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CLASSES)
def test_without_native_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence by the model's modules; a sequence is not divided, and never computed twice."""
    monkeypatch.setattr(native, "_opened", lambda: native.choose("0"))
    core = engine(name, blocks=9)
    assert core.runner.why is not None
    requests = [
        (prompt, params.replaced(speculative_tokens=0, prompt_logprobs=None))
        for prompt, params in requests_of(3, 12)
    ]
    answers = together(core, requests, 4)
    for answer, (prompt, params) in zip(answers, requests, strict=True):
        if answer is not None:
            assert answer.result == run(engine(name), prompt, params).result
    stats = core.stats()
    assert (stats.preemptions, stats.cache_used, stats.prefix_hit_tokens) == (0, 0, 0)
    assert not core.runner._caches  # type: ignore[attr-defined]
