"""Requests per second of `monoblock batch --ray` with one actor and with two, each on one thread.

    python bench/ray_replicas.py [--requests 400] [--tokens 48] [--rounds 2]

Completions of the embedded demo, in bfloat16 as stored. Starting Ray and loading are not counted: the rate is that of
the results after the first tenth. Rounds alternate between one actor and two, so that other work on the machine has
the same effect on both; the table has the best round of each, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SKIPPED = 0.1  # the share of the results before the rate is measured
ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0"}  # the priority of the command


def write_requests(path: Path, count: int, tokens: int) -> None:
    """Completions of different prompts, all of the same number of new tokens."""
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"def f{i}(x", **body},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rate(source: Path, output: Path, replicas: int, count: int) -> float:
    """Requests per second of a run with so many actors of one thread."""
    options = ["--device", "cpu", "--cache-memory", "64", "--max-sequences", "8", "--restart"]
    command = [sys.executable, "-m", "monoblock.cli", "batch", source, output, *options]
    command += ["--ray", "--replicas", str(replicas)]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": str(replicas)},
    ) as process:
        begun, first, found = 0.0, 0, 0
        while found < count:
            if process.poll():
                raise SystemExit(f"the batch failed with exit code {process.returncode}")
            found = output.read_bytes().count(b"\n") if output.exists() else 0
            if not begun and found >= SKIPPED * count:
                begun, first = time.perf_counter(), found
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        process.wait()
    return (count - first) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    best = {1: 0.0, 2: 0.0}
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_requests(source, given.requests, given.tokens)
        for number in range(given.rounds):
            for replicas in best:
                found = rate(source, output, replicas, given.requests)
                output.unlink()
                best[replicas] = max(best[replicas], found)
                print(f"round {number + 1}, actors {replicas}: {found:.2f} requests/s", flush=True)
    print(f"| actors of one thread | requests/s |\n|---|---|\n| 1 | {best[1]:.2f} |\n| 2 | {best[2]:.2f} |")
    print(f"ratio {best[2] / best[1]:.2f}")


if __name__ == "__main__":
    main()
