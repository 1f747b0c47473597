"""`LLM`: results in order, each as if alone, and the classes for vectors, labels and scores behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server_models
import torch
from PIL import Image

import monoblock
from monoblock import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The demo, with few sequences at once, so that prompts join and leave."""
    return LLM(dtype="float32", device="cpu", cache_memory="32MB", max_num_seqs=4, max_num_batched_tokens=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tools(folder: Path) -> LLM:
    return LLM(server_models.tools_model(folder / "tools"), device="cpu", cache_memory="8MB")


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_many_prompts_keep_their_order_and_are_as_if_alone(llm: LLM) -> None:
    prompts = [f"def f{i}(" + "x, " * (i % 7) for i in range(60)]
    every = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + i % 9, top_p=0.9 if i % 3 else 1.0)
        for i in range(60)
    ]
    together = llm.generate(prompts, every)
    assert [output.prompt for output in together] == prompts
    assert [len(output.outputs[0].token_ids) for output in together] == [1 + i % 9 for i in range(60)]
    for i in (0, 1, 17, 40, 59):
        [alone] = llm.generate(prompts[i], every[i])
        assert alone.outputs == together[i].outputs
        assert alone.prompt_token_ids == together[i].prompt_token_ids


def test_greedy_is_the_models_own_generate(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    own = llm._engine.model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, repetition_penalty=1.0)
    [output] = llm.generate("import os\n", GREEDY)
    assert output.outputs[0].token_ids == own[0, ids.shape[1] :].tolist()
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)
    assert (output.finished, output.outputs[0].finish_reason) == (True, "length")


def test_prompts_have_several_forms(llm: LLM) -> None:
    ids = llm.get_tokenizer()("import os\n")["input_ids"]
    forms: list[Any] = [
        "import os\n",
        ids,
        {"prompt": "import os\n"},
        {"prompt_token_ids": ids},
        {"prompt": "anything", "prompt_token_ids": ids},
    ]
    expected = texts(llm.generate("import os\n", GREEDY)) * len(forms)
    assert texts(llm.generate(forms, GREEDY)) == expected
    assert [texts(llm.generate(form, GREEDY))[0] for form in forms] == expected
    assert [output.prompt for output in llm.generate(forms, GREEDY)] == [
        "import os\n", None, "import os\n", None, "anything"
    ]  # fmt: skip
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["fine", 3], r"prompts\[1\] must be a text"),
        ([{"text": "x"}], r"prompts\[0\] has the key 'text'"),
        ([{}], r"prompts\[0\] has neither"),
        ([{"prompt": 3}], r"\['prompt'\] must be a text"),
        ([{"prompt_token_ids": ["a"]}], "must be token ids"),
        ([{"prompt": "x", "multi_modal_data": {"audio": 1}}], "multi_modal_data"),
        ([{"prompt": "x", "multi_modal_data": {"image": "y.png"}}], r"prompts\[0\] has an image"),
        (["fine", ""], r"prompts\[1\]: the prompt is empty"),
        (["fine", "x " * 2000], r"prompts\[1\]: the prompt has .* shorten it"),
        ([[1, 10**6]], r"prompts\[0\]: the prompt has token ids"),
        (7, "prompts must be"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(llm: LLM, prompts: Any, words: str) -> None:
    steps = llm._engine.stats().steps
    with pytest.raises((ValueError, TypeError), match=words):
        llm.generate(prompts, GREEDY)
    assert llm._engine.stats().steps == steps


def test_parameters_are_one_or_one_for_each(llm: LLM) -> None:
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(TypeError, match="must be SamplingParams"):
        llm.generate(["a"], [{"temperature": 0}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"prompts\[1\]: fields: 'nothing'"):
        llm.generate(["a", "b"], [GREEDY, SamplingParams(fields={"nothing": 1})])
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_p, defaults.repetition_penalty) == (0.8, 0.9, 1.05)
    assert defaults.max_tokens == 200


def test_choices_logprobs_and_stops(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=5, logprobs=2, prompt_logprobs=1)
    [output] = llm.generate("def add(a, b):", params)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    for one in output.outputs:
        assert one.logprobs is not None and len(one.logprobs) == 5
        chosen = [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]
        assert one.cumulative_logprob == pytest.approx(sum(chosen))
        for entry, token in zip(one.logprobs, one.token_ids, strict=True):
            ranks = [value.rank for value in entry.values()]
            assert ranks[:2] == [1, 2] and len(entry) in (2, 3)
            assert entry[token].decoded_token == llm.get_tokenizer().decode([token])
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert set(output.prompt_token_ids[1:2]) <= output.prompt_logprobs[1].keys()
    [output] = llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=30, stop="return"))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "return")
    assert "return" not in output.outputs[0].text
    assert output.outputs[0].logprobs is None and output.outputs[0].cumulative_logprob is None


def test_best_of_gives_the_likeliest(llm: LLM) -> None:
    base = {"seed": 4, "max_tokens": 5, "temperature": 1.0}
    [every] = llm.generate("def add(", SamplingParams(n=4, logprobs=0, **base))
    [best] = llm.generate("def add(", SamplingParams(n=1, best_of=4, **base))
    expected = max(every.outputs, key=lambda one: one.cumulative_logprob or 0)
    assert [one.token_ids for one in best.outputs] == [expected.token_ids]
    assert best.outputs[0].logprobs is None, "they were not asked for"


def test_the_prefix_cache_is_counted(llm: LLM) -> None:
    if not llm._engine.runner.divides:
        pytest.skip(f"no blocks are shared: {llm._engine.runner.why}")
    prompt = "# " + "words " * 150
    llm.generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY)[0].num_cached_tokens >= 64


def test_an_error_ends_the_call_and_leaves_the_engine_empty(llm: LLM) -> None:
    def broken(ids: Any, scores: Any) -> Any:
        raise ArithmeticError("no number")

    def interrupted(ids: Any, scores: Any) -> Any:
        raise KeyboardInterrupt

    for function, error in ((broken, RuntimeError), (interrupted, KeyboardInterrupt)):
        every = [SamplingParams(max_tokens=40)] * 5 + [SamplingParams(logits_processors=[function])]
        with pytest.raises(error):
            llm.generate(["a"] * 6, every)
        stats = llm._engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
    assert len(llm.generate(["a"] * 3, GREEDY)) == 3


def test_more_prompts_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(device="cpu", cache_memory="16MB", max_num_seqs=2)
    object.__setattr__(llm._engine.options, "max_waiting", 3)
    llm._engine.scheduler.options = llm._engine.options
    outputs = llm.generate(["x = "] * 40, SamplingParams(n=3, max_tokens=2, temperature=0))
    assert {tuple(tuple(one.token_ids) for one in output.outputs) for output in outputs} == {
        tuple([tuple(outputs[0].outputs[0].token_ids)] * 3)
    }


def test_a_bar_is_shown_on_a_terminal(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capfd.readouterr().err


# ---------------------------------------------------------------------------- chat


def test_conversations_get_the_template(llm: LLM) -> None:
    chats = [
        [{"role": "user", "content": f"Write f{i}."}] + [{"role": "system", "content": "Short."}] * (i == 0)
        for i in range(3)
    ]
    chats[0].reverse()
    outputs = llm.chat(chats, GREEDY)
    tokenizer = llm.get_tokenizer()
    for chat, output in zip(chats, outputs, strict=True):
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert output.prompt_token_ids == expected
        assert output.prompt == tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
    assert llm.chat(chats[1], GREEDY)[0].outputs == outputs[1].outputs
    continued = [*chats[1], {"role": "assistant", "content": "def f1("}]
    [output] = llm.chat(continued, GREEDY, continue_final_message=True)
    assert output.prompt is not None and output.prompt.endswith("<|assistant|>def f1(")
    [output] = llm.chat(chats[1], GREEDY, chat_template="{{ messages[0].content }}{{ more }}",
                        chat_template_kwargs={"more": "!"})  # fmt: skip
    assert output.prompt == "Write f1.!"


def test_tools_reach_the_template(tools: LLM) -> None:
    function = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    [output] = tools.chat([{"role": "user", "content": "a"}], GREEDY, tools=[function])
    assert output.prompt is not None and '"weather"' in output.prompt
    assert output.prompt_token_ids.count(tools.get_tokenizer().bos_token_id) == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [([], "messages must be"), ("hi", "messages must be"), ([{"content": "x"}], r"messages\[0\] must be"),
     ([[{"role": "user", "content": "x"}], []], r"messages\[1\] must be a list")],
)  # fmt: skip
def test_wrong_conversations_are_refused(llm: LLM, messages: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        llm.chat(messages, GREEDY)


def test_images_are_read_by_the_processor(folder: Path) -> None:
    source = server_models.image_model(folder / "image")
    llm = LLM(source, device="cpu", dtype="float32", cache_memory="8MB")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (17, 21, 3), np.uint8))
    other = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    prompts = [{"prompt": "a b", "multi_modal_data": {"image": one}} for one in (image, other, [image])]
    outputs = llm.generate([*prompts, "a b"], GREEDY)
    inputs = llm._engine.processor(text=["a b"], images=[image], return_tensors="pt")
    with torch.inference_mode():
        own = llm._engine.model.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert outputs[0].outputs[0].token_ids == own[0, inputs["input_ids"].shape[1] :].tolist()
    assert outputs[0].prompt_token_ids == inputs["input_ids"][0].tolist()
    assert outputs[2].outputs == outputs[0].outputs
    assert len(outputs[3].prompt_token_ids) < len(outputs[1].prompt_token_ids)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "a b"}]
    [chat] = llm.chat([{"role": "user", "content": content}], GREEDY)
    assert chat.outputs == outputs[0].outputs
    with pytest.raises(ValueError, match="pass one"):
        llm.generate({"prompt": "a", "multi_modal_data": {"image": [image, other]}}, GREEDY)
    with pytest.raises(ValueError, match="parts of a message"):
        llm.chat([{"role": "user", "content": [{"type": "audio"}]}], GREEDY)


# ---------------------------------------------------------------------------- loading


def test_a_loaded_model_is_taken(llm: LLM, tools: LLM) -> None:
    model, tokenizer = tools._engine.model, tools.get_tokenizer()
    again = LLM(model, tokenizer=tokenizer, cache_memory="8MB")
    assert texts(again.generate("name", GREEDY)) == texts(tools.generate("name", GREEDY))
    with pytest.raises(ValueError, match="pass its tokenizer"):
        LLM(model)
    with pytest.raises(ValueError, match="quantization has no effect"):
        LLM(model, tokenizer=tokenizer, quantization="int8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "eagle"}, "expected one of suffix, ngram"),
        ({"method": "suffix", "model": "x"}, "has the key 'model'"),
        ({"method": "suffix", "num_speculative_tokens": 0}, "speculative_tokens must be from 1 to 64"),
    ],
)
def test_wrong_speculative_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(speculative_config=config)


def test_options_reach_the_engine() -> None:
    llm = LLM(device="cpu", quantization="int8", max_model_len=100, cache_memory=4 << 20, max_num_seqs=3,
              max_num_batched_tokens=32, enable_prefix_caching=False)  # fmt: skip
    options = llm._engine.options
    assert (options.max_sequences, options.max_step_tokens, options.prefix_cache) == (3, 32, False)
    assert (options.cache_memory, llm._engine.max_model_len) == (4 << 20, 100)
    with pytest.raises(ValueError, match="at most 100 fit"):
        llm.generate("x " * 200, GREEDY)
    plain = LLM(
        device="cpu", cache_memory="4MB", speculative_config={"method": "ngram", "num_speculative_tokens": 5}
    )
    assert (plain._engine.drafting.method, plain._engine.drafting.count) == ("lookup", 5)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=1)
    values = [one.generate("import", params)[0].outputs[0].cumulative_logprob for one in (llm, plain)]
    assert values[0] != values[1], "the weights are quantised"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tasks": 1}, TypeError, "takes no argument 'tasks'"),
        ({"task": "sing"}, ValueError, "expected one of generate, embed, classify"),
        ({"cache_memory": "much"}, ValueError, "cache_memory='much'"),
        ({"max_num_seqs": 0}, ValueError, "max_sequences must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LLM(**options)


# ---------------------------------------------------------------------------- vectors, labels, scores


def test_vectors_are_those_of_sentence_transformer(folder: Path) -> None:
    source = server_models.vector_model(folder)
    llm = LLM(source, device="cpu")
    assert llm.task == "embed"
    own = monoblock.SentenceTransformer(str(source), device="cpu")
    some = ["one", "two words", "one"]
    outputs = llm.embed(some)
    assert np.array_equal([output.outputs.embedding for output in outputs], own.encode(some))
    assert outputs[1].prompt_token_ids == own.tokenizer("two words")["input_ids"]
    assert len({output.request_id for output in outputs}) == 3
    normal = llm.embed("one", normalize_embeddings=True)[0].outputs.embedding
    assert np.linalg.norm(normal) == pytest.approx(1, abs=1e-5)
    expected = own.similarity(own.encode(["one"]), own.encode(["two words", "one"]))
    scores = [output.outputs.score for output in llm.score("one", ["two words", "one"])]
    assert np.allclose(scores, np.asarray(expected)[0], atol=1e-6)
    with pytest.raises(ValueError, match="'generate'"):
        llm.generate("one")
    assert llm.embed([]) == []


def test_the_task_can_be_another_one(tools: LLM) -> None:
    """The last token's hidden state of a model that generates text."""
    llm = LLM(device="cpu", dtype="float32", task="embed", max_model_len=4)
    [output] = llm.embed("def add(a, b): return a + b")
    own = monoblock.SentenceTransformer(str(monoblock.demo.path()), device="cpu", dtype="float32")
    own.max_seq_length = 4
    assert np.array_equal(output.outputs.embedding, own.encode("def add(a, b): return a + b"))
    assert len(output.prompt_token_ids) == 4
    with pytest.raises(ValueError, match="not a loaded model"):
        LLM(tools._engine.model, task="embed").embed("a")
    with pytest.raises(ValueError, match="adapter is for models that generate"):
        LLM(task="embed", adapter="x")


def test_labels_are_those_of_the_pipeline(folder: Path) -> None:
    source = server_models.score_model(folder / "labels", 3)
    llm = LLM(source, device="cpu")
    assert llm.task == "classify"
    some = ["one", "two words and more", "three"]
    own = monoblock.pipeline("text-classification", model=str(source), device="cpu")(some, top_k=None)
    for output, ranked in zip(llm.classify(some), own, strict=True):
        expected = {entry["label"]: entry["score"] for entry in ranked}
        assert output.outputs.label == ranked[0]["label"]
        assert output.outputs.probs == pytest.approx([expected[f"label {i}"] for i in range(3)], abs=1e-6)
        assert output.outputs.num_classes == 3
    with pytest.raises(ValueError, match="has 3 labels"):
        llm.score("a", "b")


def test_scores_are_those_of_the_cross_encoder(folder: Path) -> None:
    source = server_models.score_model(folder / "scores", 1)
    llm = LLM(source, device="cpu")
    own = monoblock.CrossEncoder(str(source), device="cpu")
    expected = own.predict([("one", "two"), ("one", "three words here")])
    outputs = llm.score("one", ["two", "three words here"])
    assert np.allclose([output.outputs.score for output in outputs], expected, atol=1e-6)
    assert [o.outputs.score for o in llm.score(["one"] * 2, ["two", "three words here"])] == [
        o.outputs.score for o in outputs
    ]
    with pytest.raises(ValueError, match="3 and 2 texts"):
        llm.score(["a"] * 3, ["b"] * 2)


def test_no_package_of_the_server_is_needed() -> None:
    code = """
import sys
from monoblock import LLM
for name in ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"):
    assert name not in sys.modules
    sys.modules[name] = None
llm = LLM(device="cpu", cache_memory="8MB")
print(llm.generate("import")[0].outputs[0].text)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr


def test_methods_need_their_kind_of_model(llm: LLM) -> None:
    for call in (lambda: llm.embed("a"), lambda: llm.classify("a"), lambda: llm.score("a", "b")):
        with pytest.raises(ValueError, match="is for 'generate'"):
            call()
