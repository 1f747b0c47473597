"""`monoblock serve --ray` with the real Ray Serve: a replica is killed under load, and no request is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve")
from test_ray import processes

REQUESTS = 24
SECONDS = 600.0  # that the command may take to start, and the requests
SERVE = ("serve", "--device", "cpu", "--dtype", "float32", "--cache-memory", "32", "--port", "0")
RAY = ("--ray", "--replicas", "2")
# Ray lowers the priority of its processes, which on a busy machine would get no time.
ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0"}


class RunningServer:
    """A command that serves."""

    def __init__(self, log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "monoblock.cli", *SERVE, *options]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=ENVIRONMENT
            )
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        timer.cancel()
        assert line.startswith("monoblock serves demo on http://127.0.0.1:"), log.read_text()
        self.http = httpx.Client(base_url=line.rpartition(" ")[2].strip(), timeout=SECONDS)

    def complete(self, i: int, **more: Any) -> httpx.Response:
        body = {"prompt": f"def f{i}(", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        return self.http.post("/v1/completions", json=body | more)

    def completed(self, i: int) -> Any:
        """The choices; a request that is told to try again does so."""
        until = time.monotonic() + SECONDS
        while (answer := self.complete(i)).status_code == 503:
            assert time.monotonic() < until
            time.sleep(int(answer.headers["retry-after"]))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def end(self) -> None:
        """SIGTERM: the command ends by itself."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SECONDS) == 0
        assert self.process.stdout is not None and self.process.stdout.read() == ""


def test_no_request_is_lost_when_a_replica_is_killed(tmp_path: Path) -> None:
    one = RunningServer(tmp_path / "one")
    expected = [one.completed(i) for i in range(REQUESTS)]
    one.end()
    server = RunningServer(tmp_path / "two", *RAY)
    try:
        replicas = processes(server.process.pid, "ray::ServeReplica:monoblock:Replica")
        assert len(replicas) == 2
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(server.completed, i) for i in range(REQUESTS)]
            while not any(task.done() for task in running):
                time.sleep(0.01)
            os.kill(replicas[0], signal.SIGKILL)
            found = [task.result() for task in running]
        assert found == expected
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.complete(0, unknown=1).status_code == 400
        with server.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
            assert list(answer.iter_lines())[-2:] == ["data: [DONE]", ""]
    finally:
        server.end()


def test_turns_of_a_chat_stay_on_the_replica_that_has_them(tmp_path: Path) -> None:
    """Six conversations on two replicas: at random a second turn would miss the prefix cache every other time."""
    server = RunningServer(tmp_path / "log", *RAY)
    try:
        for i in range(6):
            messages = [{"role": "user", "content": f"{i}: " + "def f(x): return x + 1; " * 12}]
            for turn in range(3):
                body = {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
                answer = server.http.post("/v1/chat/completions", json=body).json()
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (cached > 0) == (turn > 0), (i, turn, answer["usage"])
                messages.append(answer["choices"][0]["message"])
                messages.append({"role": "user", "content": "And then?"})
    finally:
        server.end()


def test_the_application_of_serve_run() -> None:
    from monoblock.cluster.serve import build_app

    app = build_app(
        {"models": "a,b", "replicas": "2", "max_replicas": 4, "threads": 3, "cache_memory": "100"}
    )
    [front] = [app._bound_deployment]
    [bound, body] = front.init_args
    deployment = bound._bound_deployment if hasattr(bound, "_bound_deployment") else bound
    settings, sources, threads, _ = deployment.init_args
    assert (front.name, deployment.name, body) == ("Front", "Replica", 16 * 2**20)
    assert sources == (["a", "b"], [], []) and threads == 3
    assert settings.engine.cache_memory == 100_000_000
    assert deployment.ray_actor_options == {"num_cpus": 3, "num_gpus": 0.0}
    assert deployment._deployment_config.request_router_config.request_router_kwargs == {"bound": 32}
    scale = deployment._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (2, 4, 32)
    with pytest.raises(ValueError, match="takes no argument 'model'; it takes: models, "):
        build_app({"model": "a"})
    with pytest.raises(ValueError, match="replicas='two' is not int"):
        build_app({"replicas": "two"})
