"""Many requests with random disconnects: no wrong answer, no slot that stays taken, no growth of memory; then SIGTERM
under load. `make soak` has 10,000 requests; the test suite a sample."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from monoblock import demo

REQUESTS = int(os.environ.get("MONOBLOCK_SOAK_REQUESTS", "150"))
CLIENTS = 24
# Bytes per request after the first third, when pools and caches are full: far below the size of a request's own data.
GROWTH = 2048
PROMPTS = [f"def function_{i}(self, value):" + " # more" * (i % 40) for i in range(48)]
PORT = re.compile(r"http://127\.0\.0\.1:(\d+)")


def body_of(index: int) -> dict[str, Any]:
    """A request; its answer depends on `index` modulo the number of prompts."""
    index %= len(PROMPTS)
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": PROMPTS[index],
        "max_tokens": 4 + index % 13,
        "seed": index,
    }
    return body | ({"temperature": 0} if index % 3 else {"temperature": 0.9, "n": 1 + index % 2})


def texts_of(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def memory(process: int) -> int:
    """Bytes of the process that are in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """A server in a process, and clients that check what it answers."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.expected: dict[int, list[str]] = {}
        self.answered = self.left = 0
        self.sizes: list[int] = []

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            for index in range(len(PROMPTS)):  # alone
                answer = await http.post("/v1/completions", json=body_of(index))
                assert answer.status_code == 200, answer.text
                self.expected[index] = texts_of(answer.json())
            indices = iter(range(REQUESTS))
            await asyncio.gather(*(self.client(http, indices, number) for number in range(CLIENTS)))
            assert await self.idle(http), "requests are still running after their clients have left"

    async def client(self, http: httpx.AsyncClient, indices: Any, number: int) -> None:
        rng = random.Random(number)
        for index in indices:
            if rng.random() < 0.35:
                await self.leave(http, index, rng)
            else:
                answer = await http.post("/v1/completions", json=body_of(index))
                assert answer.status_code == 200, answer.text
                assert texts_of(answer.json()) == self.expected[index % len(PROMPTS)], index
                self.answered += 1
            if index % 100 == 0:
                self.sizes.append(memory(self.process.pid))

    async def leave(self, http: httpx.AsyncClient, index: int, rng: random.Random) -> None:
        """Disconnect before the answer, or in the middle of a stream."""
        body = body_of(index) | {"stream": rng.random() < 0.6, "max_tokens": 60}
        try:
            async with (
                asyncio.timeout(rng.random() * 0.2),
                http.stream("POST", "/v1/completions", json=body) as answer,
            ):
                count = rng.randrange(4)
                async for _ in answer.aiter_lines():
                    count -= 1
                    if count < 0:
                        break
        except TimeoutError:
            pass
        self.left += 1

    async def idle(self, http: httpx.AsyncClient) -> bool:
        """Whether nothing runs any more, within a minute."""
        for _ in range(600):
            text = (await http.get("/metrics")).text
            values = [
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith(("monoblock_requests_running", "monoblock_requests_waiting"))
            ]
            assert values, text
            if not any(values):
                return True
            await asyncio.sleep(0.1)
        return False


def test_soak_and_sigterm_under_load(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "monoblock.cli",
        "serve",
        str(demo.path()),
        "--name",
        "demo",
        "--port",
        "0",
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--preload", "--drain-timeout", "60"], stdout=file, stderr=subprocess.STDOUT, text=True
        )
    try:
        url = asyncio.run(_address(log, process))
        soak = Soak(process, url)
        asyncio.run(soak.run())
        assert soak.answered > REQUESTS // 3
        assert soak.left > REQUESTS // 6
        if REQUESTS >= 3000:  # a sample is too short to tell growth from warming up
            later = soak.sizes[len(soak.sizes) // 3 :]
            grown = later[-1] - later[0]
            assert grown < GROWTH * 100 * len(later), soak.sizes
            print(
                f"{REQUESTS} requests, {soak.answered} answers; memory {[size >> 20 for size in soak.sizes]} MiB"
            )
        asyncio.run(_drains(process, url, soak.expected))
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


async def _address(log: Path, process: subprocess.Popen[str]) -> str:
    """Where the server listens, once it is ready."""
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        if found := PORT.search(log.read_text()):
            url = f"http://127.0.0.1:{found[1]}"
            async with httpx.AsyncClient(base_url=url) as http:
                try:
                    if (await http.get("/v1/models")).status_code == 200:
                        return url
                except httpx.TransportError:
                    pass
        await asyncio.sleep(0.1)
    raise AssertionError(log.read_text())


async def _drains(process: subprocess.Popen[str], url: str, expected: dict[int, list[str]]) -> None:
    """After SIGTERM, what runs is finished; later requests are refused."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        running = [
            asyncio.create_task(http.post("/v1/completions", json=body_of(index))) for index in range(12)
        ]
        await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        for index, task in enumerate(running):
            try:
                answer = await task
            except httpx.TransportError:
                continue  # its connection came after the server stopped to listen
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                assert texts_of(answer.json()) == expected[index]
