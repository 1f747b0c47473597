"""`monoblock serve` as a process: its first line, its errors, and its end by signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG: dict[str, Any] = {
    "prompt": "def f(",
    "temperature": 0,
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}
COMMAND = [
    sys.executable,
    "-m",
    "monoblock.cli",
    "serve",
    "--port",
    "0",
    "--device",
    "cpu",
    "--cache-memory",
    "32",
]


class Served:
    """A running command."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.rpartition(" ")[2].strip()
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def post(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **body})


@contextlib.contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Served]:
    found = Served(*arguments, **environment)
    try:
        yield found
    finally:
        found.http.close()
        found.process.kill()
        found.process.communicate()


def refused(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code and stderr of a command that does not start."""
    run = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert run.stdout == ""
    return run.returncode, run.stderr


def lines_of(answer: httpx.Response, found: list[str]) -> None:
    with contextlib.suppress(httpx.HTTPError):
        found += [line for line in answer.iter_lines() if line]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(sent: signal.Signals) -> None:
    """The running request is finished, new ones get 503, and then the process ends."""
    with served("--drain-timeout", "600") as running:
        assert running.line.startswith("monoblock serves demo on http://127.0.0.1:")
        assert running.post().status_code == 200
        whole = running.http.post("/v1/completions", json={**LONG, "stream": False}).json()
        with running.http.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            running.process.send_signal(sent)
            with httpx.Client(base_url=running.url, timeout=60) as other:
                while (
                    new := other.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
                ).status_code == 200:
                    pass  # the signal is on its way
                assert new.status_code == 503 and new.json()["error"]["code"] == "server_stopping"
                assert "retry-after" in new.headers
                assert other.get("/health").json() == {"status": "stopping"}
            rest = [first, *(line for line in lines if line)]
        events = [json.loads(line.removeprefix("data: ")) for line in rest if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
        assert rest[-1] == "data: [DONE]"
        assert running.process.wait(30) == (0 if sent == signal.SIGTERM else 130)


def test_draining_is_bounded() -> None:
    with served("--drain-timeout", "0.2") as running:
        running.post()
        found: list[str] = []
        with running.http.stream("POST", "/v1/completions", json={**LONG, "n": 8}) as answer:
            reader = threading.Thread(target=lines_of, args=(answer, found))
            reader.start()
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0
            reader.join(30)
        assert '"code":"server_stopping"' in found[-2] and 'finish_reason":"length' not in found[-3]


def test_a_second_signal_ends_at_once() -> None:
    with served() as running:
        running.post()
        with running.http.stream("POST", "/v1/completions", json={**LONG, "n": 16}) as answer:
            reader = threading.Thread(target=lines_of, args=(answer, []))
            reader.start()
            for _ in range(2):
                running.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.process.wait(1)
            running.process.wait(10)
            reader.join(30)


def test_the_key_from_the_environment_and_a_port_in_use() -> None:
    with served("--name", "mine", MONOBLOCK_API_KEY="sesame") as running:
        assert running.line.startswith("monoblock serves mine on ")
        assert running.post().status_code == 401
        running.http.headers["Authorization"] = "Bearer sesame"
        assert running.post(model="mine").status_code == 200
        assert [one["id"] for one in running.http.get("/v1/models").json()["data"]] == [
            "mine",
            "demo-embeddings",
        ]
        vectors = running.http.post("/v1/embeddings", json={"input": ["read a file", "open a file"]})
        assert vectors.status_code == 200 and vectors.json()["model"] == "demo-embeddings"
        assert len(vectors.json()["data"][0]["embedding"]) >= 64
        port = running.url.rpartition(":")[2]
        run = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, timeout=120)
        assert run.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in run.stderr


def test_errors_before_listening(tmp_path: Path) -> None:
    code, text = refused(str(tmp_path / "nothing"), "--offline")
    assert code == 1 and "nothing" in text
    assert refused("--adapter", "x")[0] == 2
    assert refused("--api-key", "")[0] == 2
    code, text = refused("--allow-files", str(tmp_path / "nothing"))
    assert code == 2 and "not a folder" in text
    code, text = refused("--name", "a", "--name", "b")
    assert code == 1 and "2 names for 1 models" in text
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(
        '{"model_type": "mpnet", "architectures": ["MPNetForTokenClassification"]}'
    )
    code, text = refused(str(tmp_path / "empty"))
    assert code == 1 and "MPNetForTokenClassification is not served" in text


def test_the_only_model_is_loaded_at_the_start(tmp_path: Path) -> None:
    """A process whose model cannot be loaded ends with its error."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 32, "n_heads": 2, "n_layers": 1}'
    )
    run = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "monoblock:" in run.stderr and "Traceback" not in run.stderr
