"""Every field of the main endpoints behaves as the table says, and the table has every field of OpenAI's client."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import LiveServer

from monoblock.serving.server.endpoints import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    ENDPOINTS,
    MAIN,
    RESPONSES,
)
from monoblock.serving.server.fields import ApiField, Endpoint, Status

ROOT = Path(__file__).parents[2]
EOS, PAD, USER = 0, 1, 2  # of the demo's tokenizer; 2 is <|user|>
BIAS = 100
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}
OTHER = {**ADD, "function": {**ADD["function"], "name": "other"}}
DIGITS = {"type": "regex", "pattern": "[0-9]{3}"}
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}

BODIES: dict[str, dict[str, Any]] = {
    CHAT.path: {
        "model": "demo",
        "messages": [{"role": "user", "content": "Write a loop over the lines of a file."}],
        "max_tokens": 8,
        "temperature": 0,
    },
    COMPLETIONS.path: {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0},
    RESPONSES.path: {
        "model": "demo",
        "input": "Write a loop over the lines of a file.",
        "max_output_tokens": 8,
        "temperature": 0,
    },
    EMBEDDINGS.path: {"model": "vectors", "input": ["the cat sat on the mat", "a dog"]},
}
Case = Callable[[LiveServer], None]
CASES: dict[tuple[str, str], Case] = {}


def case(*paths: str, name: str) -> Callable[[Case], Case]:
    """Registers the test of a field."""

    def register(function: Case) -> Case:
        for path in paths:
            CASES[path, name] = function
        return function

    return register


class Caller:
    """Requests to one endpoint, with its usual body changed."""

    def __init__(self, server: LiveServer, path: str) -> None:
        self.server, self.path = server, path

    def body(self, changes: dict[str, Any]) -> dict[str, Any]:
        body = {**BODIES[self.path], **changes}
        return {name: value for name, value in body.items() if value is not ...}

    def __call__(self, **changes: Any) -> Any:
        return self.server.ok(self.path, **self.body(changes))

    def error(self, **changes: Any) -> dict[str, Any]:
        return self.server.error(self.path, **self.body(changes))

    def events(self, **changes: Any) -> list[dict[str, Any]]:
        return self.server.events(self.path, **self.body(changes))

    def text(self, **changes: Any) -> str:
        """The text of the first choice."""
        return text_of(self.path, self(**changes))

    def ids(self, **changes: Any) -> list[int]:
        return self(**changes, return_token_ids=True)["choices"][0]["token_ids"]

    def prompt(self, **changes: Any) -> list[int]:
        """The ids of the prompt."""
        answer = self(**{"max_tokens": 1, **changes}, return_token_ids=True)
        return answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]


def text_of(path: str, answer: dict[str, Any]) -> str:
    if path == RESPONSES.path:
        return answer["output"][0]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if path == COMPLETIONS.path else choice["message"]["content"]


def tokens(server: LiveServer, text: str, model: str = "demo") -> list[int]:
    return server.ok("/tokenize", model=model, prompt=text, add_special_tokens=False)["tokens"]


GENERATING = (CHAT.path, COMPLETIONS.path)
TEXTS = (*GENERATING, RESPONSES.path)


def for_paths(*paths: str, name: str) -> Callable[[Callable[[Caller], None]], Callable[[Caller], None]]:
    """Registers a test that takes a `Caller`, for each of these endpoints."""

    def register(function: Callable[[Caller], None]) -> Callable[[Caller], None]:
        for path in paths:
            CASES[path, name] = lambda server, path=path: function(Caller(server, path))
        return function

    return register


# ---------------------------------------------------------------------------- sampling


@for_paths(*TEXTS, EMBEDDINGS.path, name="model")
def _(call: Caller) -> None:
    assert call()["model"] == BODIES[call.path]["model"]
    error = call.server.error(call.path, 404, **call.body({"model": "nobody"}))
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert call.error(model=...)["param"] == "model"  # there are several
    other = "vectors" if call.path != EMBEDDINGS.path else "demo"
    assert call.error(model=other)["code"] == "model_not_supported"


@for_paths(*TEXTS, name="temperature")
def _(call: Caller) -> None:
    assert call.text() == call.text()
    hot = {call.text(temperature=2, top_p=1) for _ in range(4)}
    assert len(hot) > 1
    assert call.error(temperature=2.5)["param"] == "temperature"


@for_paths(*TEXTS, name="top_p")
def _(call: Caller) -> None:
    assert call.text(temperature=2, top_p=1e-6) == call.text()
    assert call.error(top_p=1.5)["param"] == "top_p"


@for_paths(*GENERATING, name="top_k")
def _(call: Caller) -> None:
    assert call.text(temperature=2, top_k=1) == call.text()


@for_paths(*GENERATING, name="min_p")
def _(call: Caller) -> None:
    assert call.text(temperature=2, top_p=1, min_p=1) == call.text()


@for_paths(*GENERATING, name="seed")
def _(call: Caller) -> None:
    texts = [call.text(temperature=1.5, top_p=1, seed=seed) for seed in (1, 2, 3, 4)]
    assert texts == [call.text(temperature=1.5, top_p=1, seed=seed) for seed in (1, 2, 3, 4)]
    assert len(set(texts)) > 1


def distinct(call: Caller, **changes: Any) -> int:
    """Different tokens among 40."""
    return len(set(call.ids(**{"max_tokens": 40, "ignore_eos": True, "repetition_penalty": 1, **changes})))


@for_paths(*GENERATING, name="presence_penalty")
def _(call: Caller) -> None:
    assert distinct(call, presence_penalty=2) > distinct(call)


@for_paths(*GENERATING, name="frequency_penalty")
def _(call: Caller) -> None:
    bias = {"100": BIAS, "101": 80}
    assert distinct(call, logit_bias=bias) == 1
    assert distinct(call, logit_bias=bias, presence_penalty=2) == 1  # of one time
    assert distinct(call, logit_bias=bias, frequency_penalty=2) == 2


@for_paths(*GENERATING, name="repetition_penalty")
def _(call: Caller) -> None:
    assert distinct(call, repetition_penalty=1.5) > distinct(call)


@for_paths(*GENERATING, name="logit_bias")
def _(call: Caller) -> None:
    assert call.ids(logit_bias={"100": BIAS}, repetition_penalty=1) == [100] * 8
    assert call.error(logit_bias={"9999999": 1})["param"].startswith("logit_bias")
    assert call.error(logit_bias={"x": 1})["param"].startswith("logit_bias")


@for_paths(*GENERATING, name="stop")
def _(call: Caller) -> None:
    text = call.text()
    end = text[3:6]
    answer = call(stop=[end, "never there"])
    assert text_of(call.path, answer) == text[: text.index(end)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == end
    assert call.text(stop=end) == text[: text.index(end)]


@for_paths(*GENERATING, name="include_stop_str_in_output")
def _(call: Caller) -> None:
    end = call.text()[3:6]
    assert call.text(stop=end, include_stop_str_in_output=True).endswith(end)


@for_paths(*GENERATING, name="stop_token_ids")
def _(call: Caller) -> None:
    answer = call(logit_bias={"100": BIAS}, stop_token_ids=[100])
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == 100


@for_paths(*GENERATING, name="min_tokens")
def _(call: Caller) -> None:
    bias = {str(EOS): BIAS}
    assert call(logit_bias=bias)["usage"]["completion_tokens"] == 1
    assert call(logit_bias=bias, min_tokens=4)["usage"]["completion_tokens"] == 5
    assert call.error(min_tokens=9)["param"] == "min_tokens"


@for_paths(*GENERATING, name="ignore_eos")
def _(call: Caller) -> None:
    answer = call(logit_bias={str(EOS): BIAS}, ignore_eos=True, repetition_penalty=1)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"


@for_paths(*GENERATING, name="skip_special_tokens")
def _(call: Caller) -> None:
    bias = {str(USER): BIAS}
    assert call.text(logit_bias=bias, repetition_penalty=1, max_tokens=2) == ""
    shown = call.text(logit_bias=bias, repetition_penalty=1, max_tokens=2, skip_special_tokens=False)
    assert shown == "<|user|>" * 2


@for_paths(*GENERATING, name="speculative_tokens")
def _(call: Caller) -> None:
    same: dict[str, Any] = {"logit_bias": {"100": BIAS}, "repetition_penalty": 1, "max_tokens": 24}

    def steps() -> float:
        return call.server.metric("monoblock_engine_steps_total", model="demo")

    before = steps()
    slow = call.ids(**same)
    middle = steps()
    fast = call.ids(**same, speculative_tokens=6)
    assert slow == fast
    engine = call.server.app.state.registry.entries["demo"].loaded.engine
    if not engine.core.runner.divides:
        pytest.skip(f"no speculation: {engine.core.runner.why}")
    assert steps() - middle < middle - before


@for_paths(*GENERATING, name="speculation")
def _(call: Caller) -> None:
    same: dict[str, Any] = {"logit_bias": {"100": BIAS}, "repetition_penalty": 1, "max_tokens": 60}
    slow = call.ids(**same)
    engine = call.server.app.state.registry.entries["demo"].loaded.engine
    rule = engine.core.drafting.rule
    rule.lengths = lambda drafts, *_: [len(draft.tokens) for draft in drafts]  # whatever the machine's speed
    try:
        for method in ("suffix", "lookup"):
            before = engine.core.stats().accepted_tokens
            assert call.ids(**same, speculation=method) == slow
            assert not engine.core.runner.divides or engine.core.stats().accepted_tokens > before
    finally:
        del rule.lengths
    assert call.error(speculation="tree")["param"] == "speculation"


@for_paths(*GENERATING, name="n")
def _(call: Caller) -> None:
    answer = call(n=3, temperature=1.5, top_p=1, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] > 8
    assert call.error(n=0)["param"] == "n"
    assert call.error(n=1000)["param"] == "n"


# ---------------------------------------------------------------------------- lengths


@for_paths(*GENERATING, name="max_tokens")
def _(call: Caller) -> None:
    answer = call(max_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"
    error = call.error(max_tokens=100_000)
    assert error["code"] == "context_length_exceeded"


@for_paths(CHAT.path, name="max_completion_tokens")
def _(call: Caller) -> None:
    assert call(max_tokens=..., max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    assert call.error(max_completion_tokens=3)["param"] == "max_tokens"  # both are given


@for_paths(RESPONSES.path, name="max_output_tokens")
def _(call: Caller) -> None:
    answer = call(max_output_tokens=3)
    assert answer["usage"]["output_tokens"] == 3
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


@for_paths(*GENERATING, name="truncate_prompt_tokens")
def _(call: Caller) -> None:
    whole = call.prompt()
    assert call.prompt(truncate_prompt_tokens=3) == whole[-3:]
    assert call.prompt(truncate_prompt_tokens=1000) == whole


# ---------------------------------------------------------------------------- log-probabilities


@for_paths(CHAT.path, name="logprobs")
def _(call: Caller) -> None:
    assert call()["choices"][0]["logprobs"] is None
    choice = call(logprobs=True)["choices"][0]
    content = choice["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode()
    assert text == choice["message"]["content"]
    assert all(entry["logprob"] <= 0 and entry["top_logprobs"] == [] for entry in content)


@for_paths(CHAT.path, name="top_logprobs")
def _(call: Caller) -> None:
    content = call(logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    for entry in content:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry["token"] == entry["top_logprobs"][0]["token"]  # the likeliest, as temperature is 0
    assert call.error(top_logprobs=3)["param"] == "top_logprobs"
    assert call.error(logprobs=True, top_logprobs=21)["param"] == "top_logprobs"


@for_paths(COMPLETIONS.path, name="logprobs")
def _(call: Caller) -> None:
    choice = call(logprobs=2, repetition_penalty=1)["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(found["tokens"]))]
    for token, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values()) and len(top) == 2
    assert call(logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][0].keys() == {found["tokens"][0]}


@for_paths(*GENERATING, name="prompt_logprobs")
def _(call: Caller) -> None:
    answer = call(prompt_logprobs=2)
    found = (answer if call.path == CHAT.path else answer["choices"][0])["prompt_logprobs"]
    ids = call.prompt()
    assert found[0] is None and len(found) == len(ids)
    for token, entries in zip(ids[1:], found[1:], strict=True):
        assert str(token) in entries and 2 <= len(entries) <= 3
        assert all(entry["logprob"] <= 0 and "decoded_token" in entry for entry in entries.values())
    assert call.error(prompt_logprobs=1, stream=True)["param"] == "prompt_logprobs"


@for_paths(*GENERATING, name="return_token_ids")
def _(call: Caller) -> None:
    answer = call(return_token_ids=True)
    ids = answer["choices"][0]["token_ids"]
    text = call.server.ok("/detokenize", model="demo", tokens=ids)["prompt"]
    assert text == text_of(call.path, answer)
    assert "token_ids" not in call()["choices"][0]
    streamed = [e["choices"][0].get("token_ids", []) for e in call.events(return_token_ids=True)]
    assert [token for some in streamed for token in some] == ids


@for_paths(*GENERATING, name="return_tokens_as_token_ids")
def _(call: Caller) -> None:
    more: dict[str, Any] = {
        "logprobs": True if call.path == CHAT.path else 1,
        "return_tokens_as_token_ids": True,
    }
    answer = call(**more, return_token_ids=True)["choices"][0]
    found = answer["logprobs"]
    spelled = found["tokens"] if "tokens" in found else [entry["token"] for entry in found["content"]]
    assert spelled == [f"token_id:{token}" for token in answer["token_ids"]]


# ---------------------------------------------------------------------------- formats, streams


@for_paths(*GENERATING, name="response_format")
def _(call: Caller) -> None:
    assert call.text(response_format=DIGITS).isdecimal()
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    assert call.text(response_format=schema, max_tokens=40)[:8] == '{"age": '
    assert call.text(response_format={"type": "json_object"})[0] == "{"
    assert call.text(response_format={"type": "text"}) == call.text()
    assert call.error(response_format={"type": "xml"})["param"].startswith("response_format")
    broken = {"type": "regex", "pattern": "("}
    assert call.error(response_format=broken)["code"] == "invalid_schema"


@for_paths(RESPONSES.path, name="text")
def _(call: Caller) -> None:
    assert call.text(text={"format": DIGITS}).isdecimal()
    schema = {"type": "json_schema", "name": "person", "schema": PERSON}
    answer = call(text={"format": schema}, max_output_tokens=40)
    assert text_of(call.path, answer)[:8] == '{"age": '
    assert answer["text"]["format"]["schema"] == PERSON
    assert call.error(text={"verbosity": "high"})["param"] == "text.verbosity"


@for_paths(*TEXTS, name="stream")
def _(call: Caller) -> None:
    events = call.events()
    if call.path == RESPONSES.path:
        text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        assert text == text_of(call.path, events[-1]["response"])
    else:
        parts = [e["choices"][0] for e in events]
        text = "".join(p["text"] if "text" in p else p["delta"].get("content", "") for p in parts)
        assert parts[-1]["finish_reason"] == "length"
        assert all(e["id"] == events[0]["id"] for e in events)
    assert text == call.text()


@for_paths(*GENERATING, name="stream_options")
def _(call: Caller) -> None:
    *events, last = call.events(stream_options={"include_usage": True})
    assert last["choices"] == [] and all(event["usage"] is None for event in events)
    assert last["usage"] == call()["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    counts = [
        e["usage"]["completion_tokens"] for e in call.events(stream_options={"continuous_usage_stats": True})
    ]
    assert counts == sorted(counts) and counts[-1] == 8
    assert call.error(stream_options={"include_usage": True})["param"] == "stream_options"
    error = call.error(stream=True, stream_options={"include_obfuscation": True})
    assert error["param"] == "stream_options.include_obfuscation"


# ---------------------------------------------------------------------------- conversations


@for_paths(CHAT.path, name="messages")
def _(call: Caller) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "four", "name": "me"},
    ]
    text = "<|user|>be brief\none\ntwo<|assistant|>three<|endoftext|><|user|>four<|assistant|>"
    assert call.prompt(messages=messages) == tokens(call.server, text)
    assert call.error(messages=[])["param"] == "messages"
    assert call.error(messages=...)["code"] == "missing_required_parameter"
    assert call.error(messages=[{"role": "user"}])["param"].startswith("messages[0]")
    assert call.error(messages=[{"role": "robot", "content": "x"}])["param"] == "messages[0].role"
    error = call.error(messages=[{"role": "user", "content": "x", "colour": 1}])
    assert (error["param"], error["code"]) == ("messages[0].colour", "unknown_parameter")
    audio = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    assert call.error(messages=[{"role": "user", "content": audio}])["param"].startswith(
        "messages[0].content"
    )


@for_paths(CHAT.path, name="add_generation_prompt")
def _(call: Caller) -> None:
    assert call.prompt()[:-1] == call.prompt(add_generation_prompt=False)


@for_paths(CHAT.path, name="continue_final_message")
def _(call: Caller) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f"}]
    prompt = call.prompt(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert prompt == tokens(call.server, "<|user|>hi<|assistant|>def f")
    assert call.error(continue_final_message=True)["param"] == "continue_final_message"


@for_paths(CHAT.path, name="chat_template")
def _(call: Caller) -> None:
    prompt = call.prompt(chat_template="A{{ messages[0]['content'] }}B")
    assert prompt == tokens(call.server, "AWrite a loop over the lines of a file.B")
    assert call.error(chat_template="{% for %}")["code"] == "chat_template_error"
    assert call.error(chat_template="x" * 20_000)["param"] == "chat_template"
    assert call.error(chat_template="{{ ''.__class__ }}")["code"] == "chat_template_error"


@for_paths(CHAT.path, name="chat_template_kwargs")
def _(call: Caller) -> None:
    prompt = call.prompt(chat_template="{{ word }}", chat_template_kwargs={"word": "loop"})
    assert prompt == tokens(call.server, "loop")
    assert call.error(chat_template_kwargs={"tokenize": True})["param"] == "chat_template_kwargs"


@for_paths(CHAT.path, name="documents")
def _(call: Caller) -> None:
    template = "{% for one in documents %}{{ one['text'] }}{% endfor %}"
    prompt = call.prompt(chat_template=template, documents=[{"text": "loop"}, {"text": "file"}])
    assert prompt == tokens(call.server, "loopfile")


@for_paths(*GENERATING, name="add_special_tokens")
def _(call: Caller) -> None:
    own = {"model": "tools"}
    more, less = (call.prompt(**own, add_special_tokens=flag) for flag in (True, False))
    assert more[1:] == less and call.prompt(**own) == (more if call.path == COMPLETIONS.path else less)


@for_paths(RESPONSES.path, name="input")
def _(call: Caller) -> None:
    text = "Write a loop over the lines of a file."
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
    assert call.text(input=items) == call.text()
    more = [
        *items,
        {"type": "message", "role": "assistant", "content": "ok"},
        {"role": "user", "content": "go on"},
    ]
    assert call(input=more)["usage"]["input_tokens"] > call()["usage"]["input_tokens"]
    assert call.error(input=[])["param"] == "input"
    assert call.error(input=[{"type": "item_reference", "id": "x"}])["param"] == "input[0]"


@for_paths(RESPONSES.path, name="instructions")
def _(call: Caller) -> None:
    answer = call(instructions="be brief")
    assert answer["instructions"] == "be brief"
    assert answer["usage"]["input_tokens"] > call()["usage"]["input_tokens"]


@for_paths(RESPONSES.path, name="metadata")
def _(call: Caller) -> None:
    assert call(metadata={"a": "b"})["metadata"] == {"a": "b"}


@for_paths(RESPONSES.path, name="include")
def _(call: Caller) -> None:
    wanted = ["message.output_text.logprobs"]
    part = call(include=wanted)["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert call()["output"][0]["content"][0]["logprobs"] == []
    assert call.error(include=["file_search_call.results"])["param"] == "include[0]"


@for_paths(RESPONSES.path, name="top_logprobs")
def _(call: Caller) -> None:
    part = call(include=["message.output_text.logprobs"], top_logprobs=2)["output"][0]["content"][0]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    assert call.error(top_logprobs=2)["param"] == "top_logprobs"


# ---------------------------------------------------------------------------- tools


def calls(call: Caller, **changes: Any) -> list[tuple[str, str]]:
    """The calls (name, arguments) of an answer."""
    given: list[Any] = changes.pop("tools", [ADD, OTHER])
    limit = "max_tokens"
    if call.path == RESPONSES.path:
        given = [{"type": "function", **tool["function"]} for tool in given]
        limit = "max_output_tokens"
    answer = call(**{"model": "tools", "tools": given, limit: 120, **changes})
    if call.path == RESPONSES.path:
        return [
            (item["name"], item["arguments"]) for item in answer["output"] if item["type"] == "function_call"
        ]
    [choice] = answer["choices"]
    found = [
        (one["function"]["name"], one["function"]["arguments"])
        for one in choice["message"].get("tool_calls", [])
    ]
    assert choice["finish_reason"] in (("tool_calls", "length") if found else ("stop", "length"))
    return found


@for_paths(CHAT.path, RESPONSES.path, name="tools")
def _(call: Caller) -> None:
    [(name, arguments), *_] = calls(call, tools=[ADD], tool_choice="required", parallel_tool_calls=False)
    assert name == "add" and arguments[:6] == '{"x": '
    flat = [{"type": "function", **ADD["function"]}] if call.path == RESPONSES.path else [ADD]
    assert call.error(tools=flat)["code"] == "model_not_supported"  # the demo's template knows none
    if call.path == CHAT.path:
        with_tools, without = (call.prompt(model="tools", **more) for more in ({"tools": [ADD]}, {}))
        assert len(with_tools) > len(without)
    strict = (
        [{**flat[0], "strict": True}]
        if call.path == RESPONSES.path
        else [{"type": "function", "function": {**ADD["function"], "strict": True}}]
    )
    assert call.error(model="tools", tools=strict)["code"] == "unsupported_parameter"
    assert call.error(model="tools", tools=[*flat, *flat])["param"] == "tools"


@for_paths(CHAT.path, RESPONSES.path, name="tool_choice")
def _(call: Caller) -> None:
    named = {"type": "function", "name": "other"}
    if call.path == CHAT.path:
        named = {"type": "function", "function": {"name": "other"}}
    assert [name for name, _ in calls(call, tool_choice=named)] == ["other"]
    assert calls(call, tool_choice="required", parallel_tool_calls=False) != []
    assert calls(call, tool_choice="none") == []
    assert call.error(tool_choice="required")["param"] == "tool_choice"  # without tools
    if call.path == CHAT.path:
        assert call.prompt(model="tools", tools=[ADD], tool_choice="none") == call.prompt(model="tools")
        missing = {"type": "function", "function": {"name": "nobody"}}
        assert call.error(model="tools", tools=[ADD], tool_choice=missing)["param"] == "tool_choice"


@for_paths(CHAT.path, RESPONSES.path, name="parallel_tool_calls")
def _(call: Caller) -> None:
    more: dict[str, Any] = {}
    if call.path == CHAT.path:  # a bias towards the comma makes the model go on with the list
        [comma] = tokens(call.server, ",", "tools")
        more = {"logit_bias": {str(comma): BIAS}}
    assert len(calls(call, tool_choice="required", **more)) > 1
    assert len(calls(call, tool_choice="required", parallel_tool_calls=False, **more)) == 1


# ---------------------------------------------------------------------------- completions


@for_paths(COMPLETIONS.path, name="prompt")
def _(call: Caller) -> None:
    texts = ["def add(a, b):", "import os"]
    ids = [tokens(call.server, text) for text in texts]
    answers = [call.text(prompt=text) for text in texts]
    for given in (texts, ids):
        assert [choice["text"] for choice in call(prompt=given)["choices"]] == answers
    assert call.text(prompt=ids[1]) == answers[1]
    assert call.error(prompt=[])["param"] == "prompt"
    assert call.error(prompt=["x", 5])["param"].startswith("prompt")
    assert call.error(prompt=[5, 999_999])["param"] == "prompt[1]"
    assert call.error(prompt=[[5], [999_999]])["param"] == "prompt[1][0]"
    assert call.error(prompt=["x"] * 300)["param"] == "prompt"
    assert call.error(prompt="loop " * 3000)["code"] == "context_length_exceeded"
    assert call.prompt(prompt="") == [EOS]


@for_paths(COMPLETIONS.path, name="best_of")
def _(call: Caller) -> None:
    more = {"temperature": 1.5, "top_p": 1, "seed": 3}
    answer = call(**more, best_of=4)
    assert len(answer["choices"]) == 1 and answer["usage"]["completion_tokens"] > 8
    assert call.error(n=3, best_of=2)["param"] == "best_of"
    assert call.error(best_of=2, stream=True)["param"] == "best_of"


@for_paths(COMPLETIONS.path, name="echo")
def _(call: Caller) -> None:
    prompt = BODIES[COMPLETIONS.path]["prompt"]
    assert call.text(echo=True) == prompt + call.text()
    choice = call(echo=True, logprobs=1)["choices"][0]
    count = len(tokens(call.server, prompt))
    assert len(choice["logprobs"]["tokens"]) == count + 8
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    silent = call(echo=True, max_tokens=0, logprobs=1)
    assert silent["choices"][0]["text"] == prompt and silent["usage"]["completion_tokens"] == 0
    assert silent["choices"][0]["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"][:count]
    assert call.error(max_tokens=0)["param"] == "max_tokens"
    streamed = "".join(e["choices"][0]["text"] for e in call.events(echo=True))
    assert streamed == prompt + call.text()


# ---------------------------------------------------------------------------- embeddings


def vectors(answer: dict[str, Any]) -> np.ndarray:
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


@for_paths(EMBEDDINGS.path, name="input")
def _(call: Caller) -> None:
    both = vectors(call())
    texts = BODIES[EMBEDDINGS.path]["input"]
    for text, vector in zip(texts, both, strict=True):
        assert np.array_equal(vectors(call(input=text))[0], vector)
        ids = call.server.ok("/tokenize", model="vectors", prompt=text)["tokens"]
        assert np.array_equal(vectors(call(input=ids))[0], vector)
        assert np.array_equal(vectors(call(input=[ids]))[0], vector)
    assert call()["usage"]["prompt_tokens"] > 8
    assert call.error(input=[])["param"] == "input"
    assert call.error(input=["x"] * 3000)["param"] == "input"
    assert call.error(input=[999_999])["param"] == "input[0]"


@for_paths(EMBEDDINGS.path, name="dimensions")
def _(call: Caller) -> None:
    cut = vectors(call(dimensions=5))
    whole = vectors(call())[:, :5]
    assert np.allclose(cut, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)
    assert call.error(dimensions=1000)["param"] == "dimensions"


@for_paths(EMBEDDINGS.path, name="encoding_format")
def _(call: Caller) -> None:
    texts = [item["embedding"] for item in call(encoding_format="base64")["data"]]
    found = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in texts])
    assert np.array_equal(found, vectors(call(encoding_format="float")))


@for_paths(EMBEDDINGS.path, name="prompt_name")
def _(call: Caller) -> None:
    assert np.array_equal(
        vectors(call(input="a dog", prompt_name="query")), vectors(call(input="search: a dog"))
    )
    assert call.error(prompt_name="nothing")["param"] == "prompt_name"
    assert call.error(input=[5], prompt_name="query")["param"] == "prompt_name"


@for_paths(EMBEDDINGS.path, name="truncate_prompt_tokens")
def _(call: Caller) -> None:
    long = "the cat sat on the mat " * 20
    assert call.error(input=long)["code"] == "context_length_exceeded"
    assert call(input=long, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 48
    assert call(input=long, truncate_prompt_tokens=6)["usage"]["prompt_tokens"] == 6
    assert call.error(input=[5] * 60)["code"] == "context_length_exceeded"
    assert call(input=[5] * 60, truncate_prompt_tokens=6)["usage"]["prompt_tokens"] == 6


# ---------------------------------------------------------------------------- the tables


def of_status(status: Status) -> list[Any]:
    return [
        pytest.param(endpoint, field, id=f"{endpoint.path}-{field.name}")
        for endpoint in MAIN
        for field in endpoint.fields
        if field.status is status
    ]


def test_each_honoured_field_has_a_case() -> None:
    honoured = {(e.path, f.name) for e in MAIN for f in e.fields if f.status is Status.HONOURED}
    assert honoured == CASES.keys()


@pytest.mark.parametrize(("endpoint", "field"), of_status(Status.HONOURED))
def test_an_honoured_field_has_its_effect(server: LiveServer, endpoint: Endpoint, field: ApiField) -> None:
    CASES[endpoint.path, field.name](server)


@pytest.mark.parametrize(("endpoint", "field"), of_status(Status.HONOURED))
def test_a_value_of_the_wrong_type_is_refused_by_name(
    server: LiveServer, endpoint: Endpoint, field: ApiField
) -> None:
    error = server.error(endpoint.path, **{**BODIES[endpoint.path], field.name: [{"wrong": [1]}]})
    assert error["param"].startswith(field.name)


def essence(path: str, answer: dict[str, Any]) -> Any:
    """What does not change between two equal requests."""
    if path == RESPONSES.path:
        return text_of(path, answer), answer["usage"]["output_tokens"]
    return answer.get("choices", answer.get("data"))


@pytest.mark.parametrize(("endpoint", "field"), of_status(Status.ACCEPTED))
def test_an_accepted_field_has_no_effect(server: LiveServer, endpoint: Endpoint, field: ApiField) -> None:
    body = BODIES[endpoint.path]
    found, plain = (server.ok(endpoint.path, **b) for b in ({**body, field.name: field.example}, body))
    assert essence(endpoint.path, found) == essence(endpoint.path, plain)


@pytest.mark.parametrize(("endpoint", "field"), of_status(Status.REFUSED))
def test_a_refused_field_is_refused_by_name(server: LiveServer, endpoint: Endpoint, field: ApiField) -> None:
    body = BODIES[endpoint.path]
    error = server.error(endpoint.path, **{**body, field.name: field.example})
    assert (error["param"], error["code"]) == (field.name, "unsupported_parameter")
    assert field.about in error["message"]
    for idle in (None, *field.idle):
        server.ok(endpoint.path, **{**body, field.name: idle})


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_an_unknown_field_is_refused_by_name(server: LiveServer, endpoint: Endpoint) -> None:
    error = server.error(endpoint.path, **{**BODIES.get(endpoint.path, {"model": "demo"}), "frobnicate": 1})
    assert (error["param"], error["code"]) == ("frobnicate", "unknown_parameter")


def test_the_tables_have_the_fields_of_the_openai_client() -> None:
    pytest.importorskip("openai")
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params

    for endpoint, params in (
        (CHAT, chat_create_params.CompletionCreateParamsBase),
        (COMPLETIONS, completion_create_params.CompletionCreateParamsBase),
        (EMBEDDINGS, embedding_create_params.EmbeddingCreateParams),
        (RESPONSES, response_create_params.ResponseCreateParamsBase),
    ):
        assert params.__annotations__.keys() <= endpoint.by_name.keys()


def test_the_document_is_current() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import make_api_fields
    finally:
        sys.path.pop(0)
    assert make_api_fields.DOCUMENT.read_text(encoding="utf-8") == make_api_fields.document()
