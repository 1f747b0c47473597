"""What a server refuses, limits and cancels; and that nothing of it harms other requests."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live
from PIL import Image

from monoblock.serving.engine.engine import Engine
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.results import Delta, Usage
from monoblock.serving.server.registry import ModelRegistry
from monoblock.serving.server.settings import Limits

PROMPT = {"model": "demo", "prompt": "def f(", "temperature": 0}
LONG: dict[str, Any] = {**PROMPT, "max_tokens": 900, "ignore_eos": True}
SMALL = EngineOptions(cache_memory=32 << 20, max_sequences=1, max_waiting=1)
JSON = {"Content-Type": "application/json"}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for a condition that must become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.02)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 20 ms, so that a long request runs for 18 s at least: it cannot end before a busy machine looks."""
    step = Engine.step

    def slow(self: Engine) -> bool:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)


# ---------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "demo", "prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": NaN}', "no number"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"\\udfff": "a"}', "lone surrogate"),
        (b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "levels deep"),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "levels deep"),
        (b'{"messages": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_000 + b"}", "levels deep"),
        (b'{"prompt": [' + b"[1]," * 100_001 + b"[1]]}", "objects and lists"),
    ],
)
def test_bad_bodies(server: LiveServer, raw: bytes, words: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        answer = server.http.post(path, content=raw, headers=JSON)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_types_and_paths(server: LiveServer) -> None:
    good = json.dumps({**PROMPT, "max_tokens": 1})
    assert server.http.post("/v1/completions", content=good).status_code == 415
    plain = server.http.post("/v1/completions", content=good, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415 and "Content-Type" in plain.json()["error"]["message"]
    zipped = {**JSON, "Content-Encoding": "gzip"}
    assert server.http.post("/v1/completions", content=good, headers=zipped).status_code == 415
    assert server.http.get("/v1/nothing").status_code == 404
    wrong = server.http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"


def test_large_bodies_are_refused_before_they_are_read() -> None:
    with live(None, limits=Limits(body=1000)) as running:
        answer = running.post("/v1/completions", prompt="x" * 2000)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        chunks = (b"x" * 500 for _ in range(5))
        assert running.http.post("/v1/completions", content=chunks, headers=JSON).status_code == 413
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 99999999999\r\n\r\n"
            )
            assert b" 413 " in raw.recv(100)
        assert running.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200


def test_a_body_that_never_comes() -> None:
    with live(None, limits=Limits(body_seconds=0.3)) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.settimeout(20)
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 10\r\n\r\n{"
            )
            assert b" 408 " in raw.recv(100)


# ---------------------------------------------------------------------------- who may use it


def test_api_key() -> None:
    with live(None, api_key="sesame") as running:
        body = {**PROMPT, "max_tokens": 1}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer"},
        ):
            answer = running.http.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer sesame"}
        assert running.http.post("/v1/completions", json=body, headers=right).status_code == 200
        assert running.http.get("/v1/models").status_code == 401
        assert running.http.get("/metrics").status_code == 401
        assert running.http.get("/docs").status_code == 401
        assert running.http.get("/health").status_code == 200


def test_other_host_names(server: LiveServer) -> None:
    """A page of another site whose name leads to 127.0.0.1 cannot use the server."""
    answer = server.http.get("/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "invalid_host"
    assert server.http.get("/v1/models", headers={"Host": "[::1]:80"}).status_code == 200
    with live(None, hosts=("box.lan",)) as running:
        assert running.http.get("/v1/models", headers={"Host": "box.lan:8000"}).status_code == 200


def test_cors(server: LiveServer) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.http.options("/v1/completions", headers=asked).headers
    with live(None, cors_origins=("https://a.example",), api_key="k") as running:
        answer = running.http.options("/v1/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        refused = running.http.get("/v1/models", headers={"Origin": "https://a.example"})
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
        other = {**asked, "Origin": "https://b.example"}
        assert (
            "access-control-allow-origin"
            not in running.http.options("/v1/completions", headers=other).headers
        )


# ---------------------------------------------------------------------------- queues, time, clients that leave


@pytest.mark.usefixtures("slow_steps")
def test_a_full_queue_is_429_with_retry_after() -> None:
    with live(None, engine=SMALL) as running, contextlib.ExitStack() as stack:
        running.ok("/v1/completions", **{**PROMPT, "max_tokens": 1})
        streams: list[httpx.Response] = []
        for state in ("running", "waiting"):  # the second waits once the first has its slot
            request = running.http.stream("POST", "/v1/completions", json={**LONG, "stream": True})
            streams.append(stack.enter_context(request))
            until(lambda state=state: running.metric(f"monoblock_requests_{state}", model="demo") == 1)
        for more in ({}, {"stream": True}):
            answer = running.post("/v1/completions", **LONG, **more)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        # What never fits is an error of the request.
        assert running.error("/v1/completions", **{**PROMPT, "prompt": ["a", "b"]})["param"] == "prompt"
        assert running.error("/v1/completions", **PROMPT, n=2)["param"] == "n"
        assert all(stream.status_code == 200 for stream in streams)


@pytest.mark.usefixtures("slow_steps")
def test_requests_in_flight_are_limited() -> None:
    with live(None, limits=Limits(in_flight=1)) as running:
        running.ok("/v1/completions", **{**PROMPT, "max_tokens": 1})
        with running.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
            answer = running.post("/tokenize", prompt="x")
            assert answer.status_code == 429 and "retry-after" in answer.headers
            assert running.http.get("/health").status_code == 200


def leave(running: LiveServer, body: dict[str, Any], first: bool) -> None:
    """Sends a request and closes the connection, with `first` after the first bytes of the answer."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    until(lambda: running.metric("monoblock_requests_running", model="demo") == 1)
    assert running.metric("monoblock_requests_in_flight") == 1
    if first:
        connection.getresponse().read1(10)
    connection.close()


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_generation(stream: bool) -> None:
    with live(None, engine=SMALL) as running:
        running.ok("/v1/completions", **{**PROMPT, "max_tokens": 1})
        leave(running, {**LONG, "stream": stream, "n": 1}, first=stream)
        until(lambda: running.metric("monoblock_requests_running", model="demo") == 0)
        until(lambda: running.metric("monoblock_requests_in_flight") == 0)
        assert running.metric("monoblock_generation_tokens_total", model="demo") < 900
        assert running.metric("monoblock_requests_cancelled_total", endpoint="/v1/completions") == 1
        # The slot is free.
        assert running.ok("/v1/completions", **{**PROMPT, "max_tokens": 4})["usage"]["completion_tokens"] == 4


def test_the_time_of_a_request_is_limited() -> None:
    with live(None, limits=Limits(request_seconds=0.15)) as running:
        running.post("/v1/completions", **{**PROMPT, "max_tokens": 1})  # loads the model
        assert running.error("/v1/completions", 408, **LONG)["code"] == "request_timeout"
        *_, last = running.events("/v1/completions", **LONG)
        assert last["error"]["code"] == "request_timeout"


def test_the_time_of_a_batch_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import server_models

    from monoblock.serving.server.models import VectorModel

    go = threading.Event()
    compute = VectorModel._vectors
    monkeypatch.setattr(
        VectorModel, "_vectors", lambda self, rows, key: go.wait(60) and compute(self, rows, key)
    )
    with live(server_models.vector_model(tmp_path), limits=Limits(request_seconds=2)) as running:
        assert running.error("/v1/embeddings", 408, input="the cat")["code"] == "request_timeout"
        go.set()
        assert running.post("/v1/embeddings", input="the cat").status_code == 200


def test_new_tokens_are_limited() -> None:
    with live(None, limits=Limits(new_tokens=5)) as running:
        assert running.error("/v1/completions", **{**PROMPT, "max_tokens": 6})["param"] == "max_tokens"
        messages = [{"role": "user", "content": "x"}]
        answer = running.ok("/v1/chat/completions", messages=messages, ignore_eos=True)  # the only model
        assert answer["usage"]["completion_tokens"] == 5


def test_bad_requests_do_not_harm_others(server: LiveServer) -> None:
    body = {**PROMPT, "max_tokens": 60}
    alone = server.ok("/v1/completions", **body)["choices"]
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {**PROMPT, "response_format": {"type": "regex", "pattern": "("}}),
        ("/v1/completions", {**PROMPT, "logit_bias": {"99999999": 1}}),
        ("/v1/completions", {**PROMPT, "response_format": {"type": "regex", "pattern": "(a|b)*a(a|b){40}"}}),
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "x"}],
                                  "chat_template": "{% for i in range(10**9) %}{% endfor %}"}),
        ("/v1/chat/completions", {"model": "images", "messages": [{"role": "user", "content": [image("bad")]}]}),
        ("/v1/embeddings", {"model": "vectors", "input": [999_999]}),
    ]  # fmt: skip
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(server.ok("/v1/completions", **body)["choices"]))
        for _ in range(3)
    ]
    threads += [
        threading.Thread(
            target=lambda p=path, b=bad_body: server.post(p, **b).status_code < 500 or found.append(p)
        )
        for path, bad_body in bad
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [alone] * 3


class Broken:
    """A generation that fails after a token."""

    def __init__(self, error: Exception) -> None:
        self.error, self.usage, self.prompt, self.prompt_logprobs = error, Usage(prompt=1), [1], []
        self._left = [Delta(0, "x", (5,))]

    def cancel(self) -> None:
        pass

    def __aiter__(self) -> Broken:
        return self

    async def __anext__(self) -> Delta:
        if self._left:
            return self._left.pop()
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(RuntimeError("secret"), 500, "internal_error"), (ValueError("no token is left"), 400, "invalid_value")],
)
def test_errors_of_the_engine(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str
) -> None:
    server.ok("/v1/completions", **PROMPT, max_tokens=1)
    engine = server.app.state.registry.entries["demo"].loaded.engine
    monkeypatch.setattr(engine, "submit", lambda *_, **__: Broken(error))
    found = server.error("/v1/completions", status, **PROMPT)
    assert found["code"] == code and "secret" not in found["message"]
    *_, last = server.events("/v1/completions", **PROMPT)
    assert last["error"]["code"] in (code, "engine_error") and "secret" not in last["error"]["message"]
    monkeypatch.undo()
    assert server.ok("/v1/completions", **PROMPT, max_tokens=1)["usage"]["completion_tokens"] == 1


# ---------------------------------------------------------------------------- schemas and templates


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "code"),
    [
        (nested(25), "schema_too_complex"),
        ({"enum": [str(i) for i in range(5000)]}, "schema_too_complex"),
        ({"description": "x" * 200_000}, "schema_too_complex"),
        ({"anyOf": [{"const": i} for i in range(5000)]}, "schema_too_complex"),
        ({"allOf": [{"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {"type": "string"}}}
                               for i in range(8)]} for j in range(6)]}, "invalid_schema"),
        ({"type": "number", "multipleOf": 1e-9, "minimum": -1e300}, "invalid_schema"),
        ({"type": "string", "x-guidance": {"whitespace_flexible": True}}, "invalid_schema"),
        ({"type": "nothing"}, "invalid_schema"),
        ({"$ref": "#/$defs/missing"}, "invalid_schema"),
        ({"$ref": "https://example.com/schema"}, "invalid_schema"),
    ],
)  # fmt: skip
def test_schemas_that_explode_are_refused(server: LiveServer, schema: Any, code: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    error = server.error("/v1/completions", **PROMPT, response_format=form)
    assert error["code"] == code and error["param"].startswith("response_format")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_that_explode_are_refused(server: LiveServer, template: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    error = server.error("/v1/chat/completions", model="demo", messages=messages, chat_template=template)
    assert (error["param"], error["code"]) == ("chat_template", "chat_template_error")


# ---------------------------------------------------------------------------- images


def png(width: int, height: int, colour: tuple[int, int, int] = (200, 10, 10)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return data.getvalue()


def image(url: str | bytes) -> dict[str, Any]:
    """A part of a message."""
    if isinstance(url, bytes):
        url = "data:image/png;base64," + base64.b64encode(url).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def bomb(width: int, height: int) -> bytes:
    """A PNG of many pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def about(running: LiveServer, *parts: Any, model: str = "images") -> httpx.Response:
    content = [*parts, {"type": "text", "text": "what is in the box"}]
    messages = [{"role": "user", "content": content}]
    return running.post("/v1/chat/completions", model=model, messages=messages, max_tokens=4, temperature=0)


def test_images(server: LiveServer) -> None:
    red, other = (about(server, image(data)) for data in (png(16, 12), png(16, 12, (0, 250, 90))))
    assert red.status_code == other.status_code == 200, red.text
    assert red.json()["usage"]["prompt_tokens"] > 12  # 12 patches
    plain = about(server).json()
    assert plain["usage"]["prompt_tokens"] < red.json()["usage"]["prompt_tokens"]
    item = {"role": "user", "content": [
        {"type": "input_image", "image_url": image(png(16, 12))["image_url"]["url"]},
        {"type": "input_text", "text": "what is in the box"},
    ]}  # fmt: skip
    answer = server.ok("/v1/responses", model="images", input=[item], max_output_tokens=4, temperature=0)
    [part] = answer["output"][0]["content"]
    assert part["text"] == red.json()["choices"][0]["message"]["content"]


def test_errors_of_an_image_come_before_a_stream(server: LiveServer) -> None:
    content = [image(png(16, 12)), {"type": "text", "text": "loop " * 300}]  # more than the model's context
    body = {"model": "images", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    for stream in (False, True):
        assert server.error("/v1/chat/completions", **body, stream=stream)["code"] == "invalid_value"
    good = {
        **body,
        "messages": [{"role": "user", "content": [image(png(16, 12)), content[1] | {"text": "box"}]}],
    }
    whole = server.ok("/v1/chat/completions", **good, temperature=0)["choices"][0]["message"]["content"]
    events = server.events("/v1/chat/completions", **good, temperature=0)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        (bomb(100_000, 100_000), 400, "image_too_large"),
        (png(8, 8)[:40], 400, "invalid_image_url"),
        (bomb(6000, 6000), 400, "image_too_large"),
        (b"no image", 400, "invalid_image_url"),
        (b"x" * 11_000_000, 413, "image_too_large"),
        ("data:image/png;base64,$$$", 400, "invalid_image_url"),
        ("data:image/png,abc", 400, "invalid_image_url"),
        ("file:///etc/passwd", 400, "invalid_image_url"),
        ("http://127.0.0.1/x.png", 400, "invalid_image_url"),
        ("ftp://example.com/x.png", 400, "invalid_image_url"),
        ("/etc/passwd", 400, "invalid_image_url"),
        ("", 400, "invalid_image_url"),
    ],
    ids=range(12),
)
def test_images_that_are_refused(server: LiveServer, url: Any, status: int, code: str) -> None:
    answer = about(server, image(url))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"


def test_images_of_models_and_numbers(server: LiveServer) -> None:
    assert about(server, image(png(8, 8)), model="demo").json()["error"]["code"] == "model_not_supported"
    assert (
        about(server, image(png(8, 8)), image(png(8, 8)))
        .json()["error"]["param"]
        .startswith("messages[0].content[1]")
    )
    detail = image(png(8, 8))
    detail["image_url"]["detail"] = "low"
    assert about(server, detail).json()["error"]["param"].endswith("detail")


def test_files_and_fetching(tmp_path: Path, server: LiveServer) -> None:
    import server_models

    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    (inside / "a b.png").write_bytes(png(16, 12))
    outside.write_bytes(png(16, 12))
    (inside / "link.png").symlink_to(outside)
    model = server_models.image_model(tmp_path / "images")
    with live(model, allow_files=inside, allow_fetch=True) as running:
        name = "images"
        assert about(running, image((inside / "a b.png").as_uri()), model=name).status_code == 200
        for url in (
            outside.as_uri(),
            (inside / "link.png").as_uri(),
            f"{inside.as_uri()}/../out.png",
            f"{inside.as_uri()}/%2e%2e/out.png",
            (inside / "missing.png").as_uri(),
            inside.as_uri(),
            f"file://elsewhere{inside}/a%20b.png",
            "file:///%00",
        ):
            assert about(running, image(url), model=name).json()["error"]["code"] == "invalid_image_url", url
        for url in (running.url, "http://localhost/x", "http://10.0.0.1/x", "http://[::1]/x", "http://user@example.com/",
                    "http://169.254.169.254/x", "http://:99999/"):  # fmt: skip
            answer = about(running, image(url), model=name).json()
            assert answer["error"]["code"] == "invalid_image_url", url


# ---------------------------------------------------------------------------- models


def test_a_model_is_unloaded_when_idle_and_loaded_again() -> None:
    with live(None, None, names=("a", "b"), idle_timeout=0.3) as running:

        def state(name: str) -> str:
            return running.http.get(f"/v1/models/{name}").json()["state"]

        assert state("a") == state("b") == "idle"
        first = running.ok("/v1/completions", **{**PROMPT, "model": "a", "max_tokens": 4})["choices"]
        assert state("b") == "idle"
        until(lambda: state("a") == "idle")
        assert running.ok("/v1/completions", **{**PROMPT, "model": "a", "max_tokens": 4})["choices"] == first


def test_health_tells_that_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    read = ModelRegistry._read

    def slow(self: ModelRegistry, entry: Any) -> Any:
        assert go.wait(60)
        return read(self, entry)

    monkeypatch.setattr(ModelRegistry, "_read", slow)
    with live(None) as running:
        until(lambda: running.http.get("/health").json() == {"status": "loading"})
        assert running.http.get("/health").status_code == 503
        go.set()
        # A request that came while the model loads is answered.
        assert running.post("/v1/completions", **{**PROMPT, "max_tokens": 1}).status_code == 200
        assert running.http.get("/health").json() == {"status": "ok"}


def test_a_server_stops_while_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(ModelRegistry, "_read", lambda self, entry: forever.wait())
    with live(None) as running:
        until(lambda: running.http.get("/health").json() == {"status": "loading"})


def test_a_model_that_cannot_be_loaded_is_503(tmp_path: Path) -> None:
    import server_models

    broken = server_models.tools_model(tmp_path / "broken")
    with live(None, broken) as running:
        (broken / "model.safetensors").write_bytes(b"no weights")
        for _ in range(2):
            error = running.error("/v1/completions", 503, model="broken", prompt="x")
            assert error["code"] == "model_not_loaded" and str(tmp_path) not in error["message"]
        assert running.http.get("/v1/models/broken").json()["state"] == "failed"
        assert running.post("/v1/completions", **{**PROMPT, "max_tokens": 1}).status_code == 200


def test_pages_without_other_origins(server: LiveServer) -> None:
    docs = server.http.get("/docs")
    assert docs.status_code == 200 and "/v1/chat/completions" in docs.text
    assert "default-src 'none'" in docs.headers["content-security-policy"]
    assert "http://" not in docs.text and "https://" not in docs.text
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    name = body["$ref"].rpartition("/")[2]
    assert {"messages", "tools", "top_k"} <= schema["components"]["schemas"][name]["properties"].keys()
    assert "audio" not in schema["components"]["schemas"][name]["properties"]
    assert server.http.get("/").status_code == 200


def test_metrics(server: LiveServer) -> None:
    before = server.metric("monoblock_generation_tokens_total", model="demo")
    server.ok("/v1/completions", **{**PROMPT, "max_tokens": 5, "ignore_eos": True})
    assert server.metric("monoblock_generation_tokens_total", model="demo") == before + 5
    assert server.metric("monoblock_time_to_first_token_seconds_count", model="demo") > 0
    assert server.metric("monoblock_time_per_output_token_seconds_count", model="demo") > 0
    assert server.metric("monoblock_requests_total", endpoint="/v1/completions", status="200") > 0
    server.post("/v1/completions", **PROMPT, temperature_=1)
    assert server.metric("monoblock_requests_total", endpoint="/v1/completions", status="400") > 0
    assert server.metric("monoblock_cache_blocks", model="demo") > 0
    hits = server.metric("monoblock_prefix_cache_hits_total", model="demo")
    for _ in range(2):
        server.ok("/v1/completions", model="demo", prompt="loop " * 150, max_tokens=1)
    if server.app.state.registry.entries["demo"].loaded.engine.core.runner.divides:
        assert server.metric("monoblock_prefix_cache_hits_total", model="demo") > hits
    server.http.get(f"/{'x' * 50}")
    assert "xxxx" not in server.http.get("/metrics").text  # labels are bounded
