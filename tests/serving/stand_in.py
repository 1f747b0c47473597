"""A server with scripted replies, for tests of the page: it streams what a real model would never write on demand.

The last message of a conversation chooses the reply, by the entries of `StandIn.replies`; everything else is answered
with `re: MESSAGE`, a word per event. `requests` has the bodies of all calls.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from monoblock.serving.page import SECURITY, page_file

MODELS = [
    {"id": "chatty", "object": "model", "kind": "generate", "chat_template": True, "max_model_len": 2048},
    {"id": "plain", "object": "model", "kind": "generate", "chat_template": False, "max_model_len": 1024},
    {"id": "vectors", "object": "model", "kind": "embed"},
]
LAYERS, HEADS = 3, 4


class StandIn:
    """The server's state; `with StandIn() as server` runs it. A test changes the attributes."""

    def __init__(self) -> None:
        self.replies: dict[str, str] = {}
        self.errors: dict[str, tuple[int, str, dict[str, str]]] = {}  # message -> status, text, headers
        self.broken: dict[str, str] = {}  # message -> "cut" or "error": how its stream ends
        self.pause = 0.0  # seconds between two events
        self.key = ""
        self.untold = False  # whether the list of models has no word about templates
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.disconnected = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the calls of that path."""
        return [body for called, body in self.requests if called == path]


class _Handler(BaseHTTPRequestHandler):
    state: StandIn
    protocol_version = "HTTP/1.0"  # a connection per request

    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/page/")
        if self.path == "/v1/models":
            if self._allowed():
                hidden = {"chat_template"} if self.state.untold else set[str]()
                models = [{k: v for k, v in model.items() if k not in hidden} for model in MODELS]
                self._json(200, {"object": "list", "data": models})
            return
        try:
            file = page_file() if self.path == "/" else page_file(name)
        except KeyError:
            self._error(404, "no such file")
            return
        self._send(200, file.content, file.type, SECURITY)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.state.requests.append((self.path, body))
        if not self._allowed():
            return
        if self.path == "/attention":
            self._attention(body)
            return
        if "messages" in body and body["model"] == "plain":
            self._error(400, "this model has no chat template", code="no_chat_template")
            return
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if asked in self.state.errors:
            status, message, headers = self.state.errors[asked]
            self._error(status, message, headers)
            return
        self._stream(asked, "messages" in body)

    def _allowed(self) -> bool:
        if self.state.key and self.headers.get("Authorization") != f"Bearer {self.state.key}":
            self._error(401, "the API key is missing or wrong")
            return False
        return True

    def _stream(self, asked: str, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        reply = self.state.replies.get(asked, f"re: {asked}" if chat else " and so on")
        how = self.state.broken.get(asked)
        words = list(_words(reply))
        try:
            for number, word in enumerate(words):
                if how and number == 2:
                    if how == "error":
                        self._event({"error": {"message": "the model failed", "code": 500}})
                    self.close_connection = True
                    return
                last = number == len(words) - 1
                choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if last else None}
                choice |= {"delta": {"content": word}} if chat else {"text": word}
                self._event({"choices": [choice]})
                time.sleep(self.state.pause)
            count = len(words)
            usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.state.disconnected.set()
        self.close_connection = True

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def _attention(self, body: dict[str, Any]) -> None:
        text = body["prompt"] if "prompt" in body else "".join(m["content"] for m in body["messages"])
        tokens = [word.replace(" ", "␣").replace("\n", "↵") for word in _words(text)]
        position = body.get("position", len(tokens) - 1)
        scores = [
            1 + (i * 7 + 3 * _index(body["layer"]) + 5 * _index(body["head"])) % 11
            for i in range(position + 1)
        ]
        scores[0] += 30
        found = {
            "model": body["model"],
            "tokens": tokens,
            "weights": [score / sum(scores) for score in scores],
            "position": position,
            "skipped": 0,
            "layer": body["layer"],
            "head": body["head"],
            "layers": LAYERS,
            "heads": HEADS,
        }
        self._json(200, found)

    def _error(
        self, status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None
    ) -> None:
        self._json(status, {"error": {"message": message, "type": "error", "code": code}}, headers)

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), "application/json", headers or {})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _index(value: int | str) -> int:
    return 0 if value == "mean" else int(value) + 1


def _words(text: str) -> Iterator[str]:
    """The text in chunks that end with a space or a line end."""
    word = ""
    for character in text:
        word += character
        if character in " \n":
            yield word
            word = ""
    if word:
        yield word
