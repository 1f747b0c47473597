"""Calls of tools that a model makes of its own accord, over a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_server import LiveServer
from test_fields import ADD

from monoblock.serving.engine.results import Delta, Usage

BODY: dict[str, Any] = {"model": "tools", "messages": [{"role": "user", "content": "hi"}], "tools": [ADD]}
CALL = '{"name": "add", "arguments": {"x": 3}}'


class Scripted:
    """A generation with a given text, a few letters per delta."""

    def __init__(self, text: str, finish: Any) -> None:
        self.usage, self.prompt, self.prompt_logprobs = Usage(prompt=3, completion=len(text)), [1, 2, 3], []
        parts = [text[i : i + 4] for i in range(0, len(text), 4)]
        self._deltas = [Delta(0, part, (5,)) for part in parts] + [Delta(0, "", (2,), (), finish)]

    def cancel(self) -> None:
        pass

    def __aiter__(self) -> Scripted:
        return self

    async def __anext__(self) -> Delta:
        if not self._deltas:
            raise StopAsyncIteration
        return self._deltas.pop(0)


def answers(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, text: str, finish: str = "stop"
) -> list[Any]:
    """The message and the finish_reason of a text, whole and streamed."""
    server.ok("/v1/chat/completions", **BODY, max_tokens=1)
    engine = server.app.state.registry.entries["tools"].loaded.engine
    monkeypatch.setattr(engine, "submit", lambda *_, **__: Scripted(text, finish))
    [choice] = server.ok("/v1/chat/completions", **BODY)["choices"]
    whole = (
        choice["message"].get("content") or "",
        choice["message"].get("tool_calls", []),
        choice["finish_reason"],
    )
    content, calls, reason = "", list[Any](), None
    for event in server.events("/v1/chat/completions", **BODY):
        [part] = event["choices"]
        content += part["delta"].get("content") or ""
        calls += part["delta"].get("tool_calls", [])
        reason = part["finish_reason"] or reason
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    for call in (*whole[1], *calls):
        assert len(call.pop("id")) == 9
    return [whole, (content, calls, reason)]


def test_mistral_calls(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"[TOOL_CALLS] [{CALL}, {CALL}]</s>"
    for content, calls, reason in answers(server, monkeypatch, text):
        assert (content, reason) == ("", "tool_calls") and len(calls) == 2
        assert calls[0]["type"] == "function" and calls[0]["function"]["name"] == "add"
        assert json.loads(calls[0]["function"]["arguments"]) == {"x": 3}


def test_text_before_calls(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, calls, reason in answers(server, monkeypatch, f"I add.[TOOL_CALLS][{CALL}]"):
        assert (content, reason) == ("I add.", "tool_calls") and len(calls) == 1


def test_a_call_that_is_cut_off_is_text(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, calls, reason in answers(server, monkeypatch, f"[TOOL_CALLS][{CALL}, {CALL[:20]}", "length"):
        assert (content, reason) == (CALL[:20], "length") and len(calls) == 1


def test_plain_text_stays_text(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, calls, reason in answers(server, monkeypatch, "The sum is 3 [see above].</s>"):
        assert (content, calls, reason) == ("The sum is 3 [see above].", [], "stop")


def test_a_json_object_of_the_engine(server: LiveServer) -> None:
    """Constrained to the text of a call, the model makes one."""
    form = {"type": "regex", "pattern": r'\{"name": "add", "arguments": \{"x": [0-9]\}\}'}
    body = {**BODY, "response_format": form, "temperature": 0, "max_tokens": 80}
    [choice] = server.ok("/v1/chat/completions", **body)["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    events = [event["choices"][0] for event in server.events("/v1/chat/completions", **body)]
    [streamed] = [part["delta"]["tool_calls"][0] for part in events if "tool_calls" in part["delta"]]
    assert streamed["function"] == call["function"]
    tools = [{"type": "function", **ADD["function"]}]
    answer = server.ok(
        "/v1/responses", model="tools", input="hi", tools=tools, text={"format": form}, temperature=0
    )
    assert [item["type"] for item in answer["output"]] == ["function_call"]
