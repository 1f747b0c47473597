"""Which replica gets a request: keys of chats and prompts, moves when replicas come and go, bounded load."""

from __future__ import annotations

import json
from typing import Any

from monoblock.cluster.affinity import BEGINNING, preferred, request_key


def key(**body: Any) -> str | None:
    return request_key(json.dumps(body).encode())


def chat(*contents: str, system: str = "Be brief.") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns]


def test_turns_of_a_chat_have_one_key() -> None:
    first = key(model="m", messages=chat("hello"))
    assert first is not None
    assert key(model="m", messages=chat("hello", "hi", "and?"), temperature=1) == first
    others = [
        key(model="m", messages=chat("hello there")),
        key(model="m", messages=chat("hello", system="Be kind.")),
        key(model="n", messages=chat("hello")),
    ]
    assert len({first, *others}) == 4


def test_prompts_that_begin_alike_have_one_key() -> None:
    text = "x" * BEGINNING
    assert key(prompt=text + "a") == key(prompt=text + "b") != key(prompt="y" + text)
    ids = list(range(BEGINNING))
    assert key(prompt=[*ids, 1]) == key(prompt=[*ids, 2]) != key(prompt=[0, *ids])


def test_requests_without_a_prompt_have_none() -> None:
    deep = b"[" * 100_000
    for body in (b"", b"{", b"[1]", b'{"input": "x"}', b'{"prompt": 3}', b'{"messages": "x"}', deep):
        assert request_key(body) is None


def chosen(keys: list[str], replicas: list[str], loads: dict[str, int], bound: int = 4) -> list[str | None]:
    return [preferred(one, replicas, str, lambda name: loads.get(name, 0), bound) for one in keys]


def test_a_replica_moves_its_own_keys_only() -> None:
    keys = [f"key {i}" for i in range(300)]
    before = chosen(keys, ["a", "b", "c"], {})
    # Binomial of 300 with p = 1/3: five standard deviations are 41.
    assert all(abs(before.count(name) - 100) <= 41 for name in "abc")
    after = chosen(keys, ["a", "c"], {})
    assert all(new == old for old, new in zip(before, after, strict=True) if old != "b")
    assert set(after) == {"a", "c"}


def test_a_busy_replica_is_passed_over() -> None:
    [own] = chosen(["key"], ["a", "b"], {})
    other = {"a": "b", "b": "a"}[str(own)]
    assert chosen(["key"], ["a", "b"], {str(own): 6, other: 2}) == [own]
    assert chosen(["key"], ["a", "b"], {str(own): 7, other: 2}) == [None]
    assert chosen(["key"], [], {}) == [None]
