"""The front of replicas: requests of a replica that dies, busy replicas, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from monoblock.cluster import front
from monoblock.cluster.front import ATTEMPTS, Front, Replicas


class Died(Exception):
    pass


class Busy(Exception):
    pass


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Answer:
    """Lists of messages, and exceptions among them."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.cancelled = items, False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[list[Any]]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            if item == "wait":
                await asyncio.Event().wait()
            else:
                yield item


def asked(*answers: Answer, body: bytes = b"{}", limit: int = 100) -> tuple[httpx.Response, list[Any]]:
    """The front's response, and the calls of replicas, which answer in that order."""
    calls: list[Any] = []

    def call(head: dict[str, Any], content: bytes) -> Answer:
        calls.append((head["path"], content))
        return answers[len(calls) - 1]

    async def ask() -> httpx.Response:
        app = Front(Replicas(call, (Died,), (Busy,)), limit)
        transport = httpx.ASGITransport(app)  # pyright: ignore
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/completions", content=body)

    return asyncio.run(ask()), calls


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "PAUSE", 0)


def test_an_answer_is_passed_on() -> None:
    response, calls = asked(Answer([[START, part(b"a", True)], [part(b"b")]]), body=b"body")
    assert (response.status_code, response.content) == (200, b"ab")
    assert calls == [("/v1/completions", b"body")]


@pytest.mark.parametrize("before", [[Died()], [[START], Died()]])
def test_another_replica_gets_the_request_of_one_that_dies(before: list[Any]) -> None:
    response, calls = asked(Answer(before), Answer([[START, part(b"whole")]]), body=b"x")
    assert response.content == b"whole" and len(calls) == 2 and calls[0] == calls[1]


def test_without_replicas_the_client_is_told_to_try_again() -> None:
    response, calls = asked(*(Answer([Died()]) for _ in range(ATTEMPTS)))
    assert len(calls) == ATTEMPTS
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "replica_lost"
    response, calls = asked(Answer([Busy()]))
    assert response.status_code == 503 and response.headers["retry-after"] == "5" and len(calls) == 1


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    response, calls = asked(Answer([[STREAM, part(b"data: 1\n\n", True)], Died()]))
    first, last = response.content.decode().strip().split("\n\n")
    assert first == "data: 1" and json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(calls) == 1
    with pytest.raises(ConnectionError):
        asked(Answer([[START, part(b"a", True)], Died()]))


def test_other_errors_are_not_tried_again_and_long_bodies_are_refused() -> None:
    with pytest.raises(KeyError):
        asked(Answer([KeyError("a bug")]))
    response, calls = asked(body=b"x" * 101)
    assert response.status_code == 413 and not calls


def test_a_client_that_leaves_cancels_its_request() -> None:
    answer = Answer([[STREAM, part(b"data: 1\n\n", True)], "wait"])
    messages: list[Any] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        if len(messages) == 1:
            while not sent:
                await asyncio.sleep(0)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    replicas = Replicas(lambda *_: answer, (Died,))
    scope = {"type": "http", "path": "/", "method": "POST", "headers": []}
    asyncio.run(Front(replicas, 100)(scope, receive, send))
    assert answer.cancelled and sent[-1] == part(b"data: 1\n\n", True)


def test_lifespan() -> None:
    given, sent = iter(["lifespan.startup", "lifespan.shutdown"]), list[str]()

    async def receive() -> Any:
        return {"type": next(given)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    unused: Callable[..., Any] = lambda *_: Answer([])  # noqa: E731
    asyncio.run(Front(Replicas(unused, ()), 1)({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
