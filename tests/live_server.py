"""A server in a thread of the test's process, on a free port, and plain requests to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.server.app import ServerApp
from monoblock.serving.server.registry import entries_of
from monoblock.serving.server.running import DrainingServer
from monoblock.serving.server.settings import ServerSettings

ENGINE = EngineOptions(cache_memory=32 << 20)


class LiveServer:
    """A running server. `url` has no path."""

    def __init__(self, app: ServerApp) -> None:
        self.app = app
        self._ready = threading.Event()
        self.url = ""
        self.server = DrainingServer(app, self._listening)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60), "the server does not start"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def _listening(self, url: str) -> None:
        self.url = url
        self._ready.set()

    def post(self, path: str, **body: Any) -> httpx.Response:
        """The answer to a JSON body."""
        return self.http.post(path, json=body)

    def ok(self, path: str, **body: Any) -> Any:
        """The JSON answer with status 200."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def error(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        """OpenAI's error object with that status."""
        answer = self.post(path, **body)
        assert answer.status_code == status, (answer.status_code, answer.text[:500])
        found = answer.json()
        assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
        return found["error"]

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The data of a stream's events; a chat's or a completion's stream ends with [DONE]."""
        found: list[dict[str, Any]] = []
        done = False
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    assert not done
                    found.append(json.loads(line.removeprefix("data: ")))
        assert done or path == "/v1/responses"
        return found

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if there is none with these labels."""
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        for line in self.http.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            if head == (f"{name}{{{wanted}}}" if wanted else name):
                return float(value)
        return 0.0

    def stop(self) -> None:
        """End the server at once."""
        self.http.close()
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def live(
    *sources: str | Path | None,
    names: Sequence[str] = (),
    adapters: Sequence[str] = (),
    **settings: Any,
) -> Iterator[LiveServer]:
    """A server of these models, with these settings."""
    given = [None if source is None else str(source) for source in sources]
    defaults: dict[str, Any] = {"port": 0, "engine": ENGINE, "loading": {"device": "cpu"}}
    app = ServerApp(entries_of(given, names, adapters, {}), ServerSettings(**{**defaults, **settings}))
    server = LiveServer(app)
    try:
        yield server
    finally:
        server.stop()
