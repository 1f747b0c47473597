"""The calls of the `openai` package over a socket."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from live_server import LiveServer
from pydantic import BaseModel
from test_fields import ADD, PERSON

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "user", "content": "Write a loop over the lines of a file."}]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: Any, **options: Any) -> Any:
    given = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**given)


def test_models(client: Any) -> None:
    assert "demo" in [model.id for model in client.models.list()]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat(client: Any) -> None:
    answer = chat(client)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # An answer goes back as a message, with all its fields.
    again: list[Any] = [*MESSAGES, choice.message.model_dump(), {"role": "user", "content": "Again."}]
    assert chat(client, messages=again).usage.prompt_tokens > answer.usage.prompt_tokens


def test_stream(client: Any) -> None:
    with chat(client, stream=True, stream_options={"include_usage": True}) as chunks:
        found = list(chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)
    whole = chat(client)
    assert text == whole.choices[0].message.content
    assert found[0].choices[0].delta.role == "assistant"
    assert found[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_n_and_logprobs(client: Any) -> None:
    answer = chat(client, n=3, logprobs=True, top_logprobs=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert spelled.decode(errors="ignore").startswith(choice.message.content)
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, temperature=1, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == [choice.message.content for choice in answer.choices]


def test_json_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    text = chat(client, response_format=form, max_tokens=60).choices[0].message.content
    assert 1 <= json.loads(text)["age"] <= 9

    class Switch(BaseModel):
        on: bool

    parsed = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Switch, temperature=0, max_tokens=60
    )
    assert isinstance(parsed.choices[0].message.parsed, Switch)


def test_tools(client: Any) -> None:
    given: dict[str, Any] = {
        "model": "tools",
        "tools": [ADD],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    [choice] = chat(client, **given, max_tokens=100).choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "add" and len(call.id) == 9
    assert 0 <= json.loads(call.function.arguments)["x"] <= 9
    # The result goes back to the model.
    result = {"role": "tool", "tool_call_id": call.id, "content": "7"}
    more = chat(client, model="tools", tools=[ADD], messages=[*MESSAGES, choice.message.model_dump(), result])
    assert more.usage.prompt_tokens > 0
    chunks = list(chat(client, **given, max_tokens=100, stream=True))
    [delta] = [c.choices[0].delta for c in chunks if c.choices[0].delta.tool_calls]
    assert delta.tool_calls[0].function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_completions(client: Any) -> None:
    answer = client.completions.create(
        model="demo", prompt=["def add(a, b):", "import"], max_tokens=6, logprobs=1, echo=True, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("def add(a, b):")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)


def test_embeddings(client: Any) -> None:
    texts = ["the cat", "a dog ran"]
    found = client.embeddings.create(model="vectors", input=texts)  # as base64
    plain = client.embeddings.create(model="vectors", input=texts, encoding_format="float")
    for one, other in zip(found.data, plain.data, strict=True):
        assert np.array_equal(np.float32(one.embedding), np.float32(other.embedding))
    assert len(client.embeddings.create(model="vectors", input="x", dimensions=4).data[0].embedding) == 4


def test_responses(client: Any) -> None:
    answer = client.responses.create(model="demo", input="hi", max_output_tokens=8, temperature=0)
    assert answer.status == "incomplete" and answer.usage.output_tokens == 8
    with client.responses.stream(model="demo", input="hi", max_output_tokens=8, temperature=0) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    assert "response.output_text.delta" in kinds
    events = list(
        client.responses.create(model="demo", input="hi", max_output_tokens=8, temperature=0, stream=True)
    )
    assert events[-1].response.output_text == answer.output_text
    tool = {"type": "function", **ADD["function"], "strict": False}
    called = client.responses.create(
        model="tools", input="hi", tools=[tool], tool_choice="required", parallel_tool_calls=False,
        max_output_tokens=100, temperature=0,
    )  # fmt: skip
    [item] = called.output
    assert item.type == "function_call" and item.name == "add"
    back: list[Any] = [
        {"role": "user", "content": "hi"},
        item.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": item.call_id, "output": "7"},
    ]
    again = client.responses.create(model="tools", input=back, max_output_tokens=4, tools=[tool])
    assert again.usage.output_tokens == 4


def test_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=9)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"frobnicate": 1})
    assert caught.value.param == "frobnicate"


async def _together(url: str) -> list[str]:
    import asyncio

    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    async def one(seed: int) -> str:
        answer = await client.completions.create(
            model="demo", prompt="def f", max_tokens=10, seed=seed, temperature=1
        )
        return answer.choices[0].text

    return await asyncio.gather(*(one(seed) for seed in range(12)))


def test_requests_at_once_are_those_alone(client: Any, server: LiveServer) -> None:
    import asyncio

    alone = [
        client.completions.create(model="demo", prompt="def f", max_tokens=10, seed=seed, temperature=1)
        .choices[0]
        .text
        for seed in range(12)
    ]
    assert asyncio.run(_together(server.url)) == alone
