"""`--ray` with the real Ray: actors and commands are killed, and the output is that of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

TEXTS, PROMPTS = 10_000, 500
SECONDS = 900.0  # that a command may take
CPU = ("--device", "cpu")
BATCH = (*CPU, "--cache-memory", "32", "--max-sequences", "2")
RAY = ("--ray", "--replicas", "2")


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "monoblock.cli", *map(str, args)]


def run(*args: object) -> str:
    """Run a command to its end; what it printed on standard error."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ") and len(done.stdout.splitlines()) == 3  # nothing of Ray's
    return done.stderr


def processes(root: int, name: str) -> list[int]:
    """Processes below a process whose command line begins with a name."""
    parents, found = dict[int, int](), list[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(name.encode()):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return [pid for pid in found if below(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def embedded(folder: Path) -> int:
    """The texts in the journal of a run; -1 without one."""
    try:
        return json.loads((folder / "x.npy.partial.json").read_bytes())["count"]
    except FileNotFoundError:
        return -1


def answered(folder: Path) -> int:
    """The results of a run."""
    path = folder / "out.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Killed:
    """A command during which processes are killed when the count of its results reaches random limits."""

    def __init__(self, args: list[str], folder: Path, count: Callable[[Path], int]) -> None:
        self.folder, self.count, self.kills = folder, count, 0
        self.log = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(args, stdout=self.log, stderr=self.log, text=True)
        self.deadline = time.monotonic() + SECONDS

    def reach(self, limit: int) -> bool:
        """Wait until there are that many results; False if the command has ended."""
        while self.process.poll() is None and self.count(self.folder) < limit:
            assert time.monotonic() < self.deadline
            time.sleep(0.002)
        return self.process.poll() is None

    def kill_actors(self, actor: str, limits: list[int], draw: random.Random) -> None:
        for limit in limits:
            if self.reach(limit) and (found := processes(self.process.pid, f"ray::{actor}")):
                os.kill(draw.choice(found), signal.SIGKILL)
                self.kills += 1

    def ended(self) -> str:
        """What it printed; it must succeed."""
        code = self.process.wait(max(1.0, self.deadline - time.monotonic()))
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        assert code == 0, text
        return text


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A file of texts, and the output of one process."""
    folder = tmp_path_factory.mktemp("texts")
    source = folder / "in.txt"
    source.write_text("".join(f"text {i}: {'a function of a list ' * (i % 5)}\n" for i in range(TEXTS)))
    whole = folder / "whole"
    whole.mkdir()
    run("embed", source, "-m", "demo-embeddings", "-o", whole / "x.npy", "-b", 1, *CPU)
    return source, files(whole)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("x.npy*")}


def embed(source: Path, folder: Path) -> list[object]:
    return ["embed", source, "-m", "demo-embeddings", "-o", folder / "x.npy", "-b", 1, *CPU]


def test_texts_embedded_while_actors_are_killed(texts: Any, tmp_path: Path) -> None:
    source, expected = texts
    draw = random.Random(0)
    job = Killed(command(*embed(source, tmp_path), *RAY), tmp_path, embedded)
    job.kill_actors("EncoderActor", sorted(draw.sample(range(1, TEXTS * 3 // 4), 4)), draw)
    output = job.ended()
    assert job.kills >= 3
    assert output.count("another one takes over its work") == job.kills
    assert files(tmp_path) == expected


def test_a_killed_command_is_resumed_without_ray(texts: Any, tmp_path: Path) -> None:
    source, expected = texts
    job = Killed(command(*embed(source, tmp_path), *RAY), tmp_path, embedded)
    assert job.reach(TEXTS // 4)
    actors = processes(job.process.pid, "ray::EncoderActor")
    job.process.kill()
    job.process.wait()
    count = embedded(tmp_path)
    assert TEXTS // 4 <= count < TEXTS
    errors = run(*embed(source, tmp_path))
    assert f"continuing after {count:,} texts" in errors
    assert files(tmp_path) == expected
    assert actors
    while any(map(alive, actors)):  # Ray's processes notice that the command has ended
        assert time.monotonic() < job.deadline
        time.sleep(0.1)


def completion(i: int) -> str:
    body = {"prompt": f"def f{i}(x", "max_tokens": 10 + i % 20, "temperature": 0}
    return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


def choices(path: Path) -> dict[str, Any]:
    """What was answered, by custom_id; fails if a request has two results."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {
        line["custom_id"]: (
            line["id"],
            line["response"]["body"]["choices"],
            line["response"]["body"]["usage"],
        )
        for line in lines
    }


def test_prompts_completed_while_actors_and_the_command_are_killed(tmp_path: Path) -> None:
    source, whole = tmp_path / "in.jsonl", tmp_path / "whole.jsonl"
    source.write_text("".join(map(completion, range(PROMPTS))))
    run("batch", source, whole, *BATCH)
    args = ("batch", source, tmp_path / "out.jsonl", *BATCH, *RAY)
    draw = random.Random(1)
    job = Killed(command(*args), tmp_path, answered)
    job.kill_actors("BatchActor", sorted(draw.sample(range(1, PROMPTS // 2), 3)), draw)
    assert job.reach(PROMPTS * 2 // 3), (tmp_path / "stderr").read_text()
    job.process.kill()
    job.process.wait()
    assert job.kills >= 2 and PROMPTS * 2 // 3 <= answered(tmp_path) < PROMPTS
    assert "continuing after" in run(*args)
    found = choices(tmp_path / "out.jsonl")
    assert len(found) == PROMPTS and found == choices(whole)


def test_errors_of_actors_are_those_of_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mpt", "architectures": ["MptForCausalLM"]}')
    source = tmp_path / "in.jsonl"
    source.write_text(completion(1))
    errors = []
    for more in ((), RAY):
        done = subprocess.run(
            command("batch", source, tmp_path / "out.jsonl", "-m", folder, *BATCH, *more),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 1
        errors.append(next(line for line in done.stderr.splitlines() if line.startswith("monoblock:")))
    assert errors[0] == errors[1]
