"""Random requests: bodies, headers, schemas, templates, images, and clients that leave. None gives a 5xx, and other
requests are answered as before.

`MONOBLOCK_FUZZ_REQUESTS` is their number, `MONOBLOCK_FUZZ_SEED` the seed (`make fuzz-server`).
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import random
import string
from typing import Any

import httpx
from live_server import LiveServer
from test_fields import ADD, BODIES, PERSON
from test_safety import bomb, png, until

from monoblock.serving.server.endpoints import ENDPOINTS
from monoblock.serving.server.fields import Status

REQUESTS = int(os.environ.get("MONOBLOCK_FUZZ_REQUESTS", "200"))
SEED = int(os.environ.get("MONOBLOCK_FUZZ_SEED", "0"))
AT_ONCE = 8
JSON = {"Content-Type": "application/json"}
WORDS = [
    "a",
    "the",
    "$ref",
    "type",
    "object",
    "x" * 300,
    "ä",
    "😀",
    "\x00",
    "</s>",
    "<|endoftext|>",
    "[TOOL_CALLS]",
    "{{",
    "{%",
    "",
]
NUMBERS = [0, 1, -1, 2, 5, 100, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e300, 3.7]
TEMPLATES = [
    "{{ messages[0]['content'] }}", "{{ messages }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ 1 / 0 }}",
    "{{ x }", "{% set a = 'x' * 10000 %}{{ a }}", "{{ messages|map(attribute='content')|join }}", "{{ self }}",
    "{{ ''.join(['a'] * 100000) }}", "{{ tools | tojson }}", "{% if %}", "{{ namespace(a=1).a }}", "",
]  # fmt: skip
PATTERNS = [
    "[0-9]+",
    "(a|b)*a(a|b){20}",
    "a{1,1000}",
    "(",
    "[",
    "\\",
    "(?=a)",
    "(?i)abc",
    "\\p{L}+",
    ".*",
    "^a$",
    "(a*)*",
    "\x00",
]
PATHS = [endpoint.path for endpoint in ENDPOINTS]
# Values that are accepted, alone or with others.
VALID: dict[str, list[Any]] = {
    "temperature": [0, 0.5, 1, 2],
    "top_p": [0, 0.1, 1],
    "top_k": [-1, 0, 1, 50],
    "min_p": [0, 0.5, 1],
    "seed": [0, 1, 2**63 - 1],
    "n": [1, 2, 5],
    "best_of": [1, 3, 8],
    "max_tokens": [0, 1, 7, 60],
    "max_completion_tokens": [1, 7, 60],
    "max_output_tokens": [1, 7, 60],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 2],
    "repetition_penalty": [0.001, 1, 1.2, 1000],
    "stop": ["a", ["e", "\n", "def"], []],
    "logit_bias": [{"0": 100}, {"5": -100, "6": 100}, {}],
    "logprobs": [0, 1, 20, True, False],
    "top_logprobs": [0, 3, 20],
    "prompt_logprobs": [0, 2],
    "echo": [True, False],
    "min_tokens": [0, 1, 5],
    "ignore_eos": [True],
    "stop_token_ids": [[], [0], [5, 6, 7]],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False],
    "speculative_tokens": [0, 4, 64],
    "speculation": ["suffix", "lookup", "off"],
    "truncate_prompt_tokens": [1, 3, 1000],
    "add_special_tokens": [True, False],
    "return_token_ids": [True],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, {"continuous_usage_stats": True}],
    "parallel_tool_calls": [True, False],
    "dimensions": [1, 5, 32],
    "encoding_format": ["float", "base64"],
    "include": [[], ["message.output_text.logprobs"]],
    "top_n": [1, 5],
    "return_documents": [True, False],
    "use_activation": [True, False],
}
EXTRA: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"model": "rank", "query": "the cat", "documents": ["a cat", "a dog"]},
    "/classify": {"model": "labels", "input": ["the cat sat"]},
    "/tokenize": {"model": "demo", "prompt": "def f"},
    "/detokenize": {"model": "demo", "tokens": [5, 6, 7]},
}


class Fuzzer:
    """Makes random requests."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        """A random JSON value."""
        draw = self.draw
        kind = draw.randrange(8 if depth < 3 else 5)
        if kind < 2:
            return (
                draw.choice(WORDS)
                if draw.random() < 0.7
                else "".join(draw.choices(string.printable, k=draw.randrange(30)))
            )
        if kind < 4:
            return draw.choice(NUMBERS)
        if kind == 4:
            return draw.choice([True, False, None])
        if kind == 5:
            return [self.value(depth + 1) for _ in range(draw.randrange(4))]
        return {str(draw.choice(WORDS)): self.value(depth + 1) for _ in range(draw.randrange(4))}

    def schema(self, depth: int = 0) -> Any:
        """A JSON schema, valid or nearly so."""
        draw = self.draw
        if depth > 4 or draw.random() < 0.2:
            simple: list[Any] = [
                {"type": "string"},
                {"type": "integer"},
                {"const": 1},
                {},
                True,
                {"$ref": "#"},
                PERSON,
            ]
            pattern = {"type": "string", "pattern": draw.choice(PATTERNS)}
            return draw.choice([*simple, pattern, {"enum": [1, "a"]}, self.value(2)])
        kind = draw.randrange(5)
        if kind == 0:
            names = draw.sample(["a", "b", "c", "ä", ""], draw.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: self.schema(depth + 1) for name in names},
                "required": draw.choice([names, [], ["missing"]]),
                "additionalProperties": draw.choice([True, False]),
            }
        if kind == 1:
            return {
                "type": "array",
                "items": self.schema(depth + 1),
                "minItems": draw.choice([0, 1, 10**6]),
                "maxItems": draw.choice([1, 5, 10**9]),
            }
        if kind == 2:
            return {
                draw.choice(["anyOf", "oneOf", "allOf"]): [
                    self.schema(depth + 1) for _ in range(draw.randrange(4))
                ]
            }
        if kind == 3:
            return {
                "type": draw.choice(["number", "integer"]),
                "minimum": draw.choice(NUMBERS),
                "multipleOf": draw.choice(NUMBERS),
            }
        return {
            "$defs": {"a": self.schema(depth + 1)},
            "$ref": draw.choice(["#/$defs/a", "#/$defs/b", "#", "x"]),
        }

    def image(self) -> Any:
        """A part with an image, mostly a broken one."""
        draw = self.draw
        data = bytearray(draw.choice([png(8, 8), bomb(50, 50), bomb(10**5, 10**5), b"GIF89a", b""]))
        for _ in range(draw.randrange(4)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        kind = draw.choice(["image/png", "image/gif", "text/plain", ""])
        url = f"data:{kind};base64,{base64.b64encode(bytes(data)).decode()}"
        return {
            "type": "image_url",
            "image_url": {"url": draw.choice([url, url, "file:///etc/passwd", "http://[", "data:"])},
        }

    def message(self) -> Any:
        draw = self.draw
        content: Any = draw.choice(
            [
                "hi",
                "",
                [{"type": "text", "text": "x"}],
                [self.image(), {"type": "text", "text": "y"}],
                None,
                self.value(),
            ]
        )
        message: dict[str, Any] = {
            "role": draw.choice(["user", "user", "assistant", "system", "tool", "developer", "x"]),
            "content": content,
        }
        if draw.random() < 0.2:
            call = {
                "id": draw.choice(["abcdefghi", "x"]),
                "type": "function",
                "function": {"name": "add", "arguments": draw.choice(["{}", "{", "1"])},
            }
            message["tool_calls"] = draw.choice([[call], [], self.value()])
        if draw.random() < 0.2:
            message["tool_call_id"] = draw.choice(["abcdefghi", "", 1])
        return message

    def special(self) -> dict[str, Any]:
        """Fields that have more than one level."""
        draw = self.draw
        named = {"type": "json_schema", "json_schema": {"name": "n", "schema": self.schema()}}
        fields: dict[str, Any] = {
            "response_format": draw.choice(
                [named, named, {"type": "regex", "pattern": draw.choice(PATTERNS)}, {"type": "json_object"}]
            ),
            "chat_template": draw.choice(TEMPLATES),
            "messages": [self.message() for _ in range(draw.randrange(1, 4))],
            "tools": [{"type": "function", "function": {**ADD["function"], "parameters": self.schema()}}],
            "tool_choice": draw.choice(
                ["auto", "required", "none", {"type": "function", "function": {"name": "add"}}]
            ),
            "logit_bias": {str(draw.choice(NUMBERS)): draw.choice(NUMBERS)},
            "stop": draw.choice(["", "a", ["", "b"], ["\x00"], ["😀" * 100]]),
            "prompt": draw.choice(
                ["", "x", [1, 2], [[1], [2]], ["a", "b"], "\x00😀", [10**9], [[]], "loop " * 2000]
            ),
            "text": {"format": {"type": "json_schema", "name": "n", "schema": self.schema()}},
            "input": draw.choice(["x", ["x", ""], [1], [[0, 5, 2]], [{"role": "user", "content": "x"}], ""]),
            "model": draw.choice(["demo", "tools", "images", "vectors", "labels", "rank", "nobody"]),
        }
        names = draw.sample(list(fields), draw.randrange(1, 5))
        return {name: fields[name] for name in names}

    def body(self, path: str) -> dict[str, Any]:
        """A body that begins as a valid one."""
        draw = self.draw
        endpoint = next(e for e in ENDPOINTS if e.path == path)
        body = copy.deepcopy(BODIES.get(path) or EXTRA[path])
        names = [n for n in VALID if n in endpoint.by_name and endpoint.by_name[n].status is Status.HONOURED]
        for name in draw.sample(names, min(len(names), draw.randrange(6))):
            body[name] = draw.choice(VALID[name])
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            body[draw.choice(endpoint.fields).name] = self.value()
        if draw.random() < 0.4:
            body |= {n: v for n, v in self.special().items() if n in endpoint.by_name or draw.random() < 0.01}
        for name in [*body]:
            if draw.random() < 0.02:
                del body[name]
        if draw.random() < 0.3:
            body["stream"] = True
        return body

    def raw(self, path: str) -> bytes:
        """The body's bytes, sometimes damaged."""
        draw = self.draw
        data = bytearray(
            json.dumps(self.body(path), ensure_ascii=draw.random() < 0.5, allow_nan=True).encode(
                "utf-8", "replace"
            )
        )
        if draw.random() < 0.1:
            for _ in range(draw.randrange(1, 5)):
                at = draw.randrange(len(data))
                data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        if draw.random() < 0.02:
            data = bytearray(b"[" * draw.randrange(100_000))
        return bytes(data)

    def headers(self) -> dict[str, str]:
        draw = self.draw
        if draw.random() < 0.9:
            return JSON
        return {
            "Content-Type": draw.choice(
                ["application/json; charset=utf-8", "text/plain", "a" * 5000, "application/json"]
            ),
            draw.choice(
                ["Authorization", "X-Thing", "Accept", "Origin", "Content-Encoding", "Expect"]
            ): draw.choice(["Bearer x", "gzip", "~" * 100, "*/*", ""]),
        }


async def run(server: LiveServer) -> tuple[dict[int, int], list[str]]:
    """The number of answers by status, and what is wrong."""
    fuzzer = Fuzzer(SEED)
    counts: dict[int, int] = {}
    wrong: list[str] = []
    gate = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:

        async def one(number: int) -> None:
            path = fuzzer.draw.choice([*PATHS, *PATHS[:2], *PATHS[:2]])
            raw, headers, leaves = fuzzer.raw(path), fuzzer.headers(), fuzzer.draw.random() < 0.1
            async with gate:
                seconds = fuzzer.draw.random() * 0.2 if leaves else None
                try:
                    async with asyncio.timeout(seconds):
                        answer = await http.post(path, content=raw, headers=headers)
                except TimeoutError:
                    counts[0] = counts.get(0, 0) + 1
                    return
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            failed = answer.status_code >= 500 or '"code":"engine_error"' in answer.text
            if failed or (answer.status_code >= 400 and "error" not in answer.json()):
                wrong.append(f"{number}: {path} {answer.status_code} {raw[:3000]!r} {answer.text[:500]}")

        for start in range(0, REQUESTS, 500):
            await asyncio.gather(*(one(n) for n in range(start, min(start + 500, REQUESTS))))
    return counts, wrong


def test_random_requests(server: LiveServer) -> None:
    good = {"model": "demo", "prompt": "def f(", "max_tokens": 20, "temperature": 0}
    before = server.ok("/v1/completions", **good)["choices"]
    counts, wrong = asyncio.run(run(server))
    print(f"answers by status: {dict(sorted(counts.items()))}")
    assert not wrong, "\n".join(wrong[:20])
    assert sum(counts.values()) == REQUESTS
    assert counts.get(200, 0) > REQUESTS // 20 and counts.get(400, 0) > REQUESTS // 10, counts
    until(lambda: server.metric("monoblock_requests_in_flight") == 0)
    for model in ("demo", "tools", "images"):
        until(lambda model=model: server.metric("monoblock_requests_running", model=model) == 0)
    assert server.ok("/v1/completions", **good)["choices"] == before
