"""Fine-tuning in processes of JAX or TensorFlow, for tests/flax, tests/tf and tests/distributed.

    python xla_processes.py FOLDER NUMBER SECONDS

FOLDER/jobs.json is a list of runs: their options, whether they resume, and perhaps the process that receives SIGTERM
("signal"), or fails ("fail"), and after which step. Process NUMBER writes FOLDER/NUMBER.json with the result or the
error of each, and exits after at most SECONDS.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xla_test_flags

from monoblock.training import Trainer, TrainingOptions
from monoblock.training.processes import processes
from monoblock.training.trainer import TrainingRun


def main(folder: Path, number: int) -> None:
    found: list[dict[str, Any]] = []
    among = None
    for job in json.loads((folder / "jobs.json").read_text()):
        _disturb(number, job.get("signal"), job.get("fail"))
        try:
            options = TrainingOptions(**job["options"])
            if among is None or options.framework == "flax":  # the mesh is of the options
                among = processes(options)
            result = Trainer(options, among).train(resume=job.get("resume", False))
            found.append({"step": result.step, "loss": result.loss, "interrupted": result.interrupted})
        except Exception as error:
            traceback.print_exc()
            found.append({"error": f"{type(error).__name__}: {error}"})
    (folder / f"{number}.json").write_text(json.dumps(found))
    if among is not None:
        among.leave()


_step = TrainingRun._step


def _disturb(number: int, signalled: Any, fails: Any) -> None:
    """Send SIGTERM to a process after a step, or let it fail."""

    def step(self: TrainingRun) -> int:
        tokens = _step(self)
        if [number, self.state.step] == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        if [number, self.state.step] == fails:
            os._exit(1)
        return tokens

    TrainingRun._step = step


# ---------------------------------------------------------------------------- in the test


def ports(count: int) -> list[int]:
    """Free ports of the loopback interface."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


def environments(framework: str, world: int, devices: int = 1) -> list[dict[str, str]]:
    """The environment of each process; `devices`: those of a process on JAX."""
    paths = [str(Path(__file__).parent), *sys.path]
    base = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
    }
    base |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    base["XLA_FLAGS"] = xla_test_flags.flags(f"--xla_force_host_platform_device_count={devices}")
    if world == 1:
        return [base]
    if framework == "tf":
        workers = [f"127.0.0.1:{port}" for port in ports(world)]
        tasks = [
            {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}} for i in range(world)
        ]
        return [{**base, "TF_CONFIG": json.dumps(task)} for task in tasks]
    address = f"127.0.0.1:{ports(1)[0]}"
    own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(world)}
    return [{**base, **own, "JAX_PROCESS_ID": str(i)} for i in range(world)]


def started(arguments: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`python *arguments` with its messages in a file."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def ended(running: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Exit codes; None for those that still run after so many seconds, or when another one has failed."""
    until = time.monotonic() + seconds
    codes: list[int | None] = []
    try:
        while time.monotonic() < until:
            codes = [process.poll() for process in running]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
        return codes
    finally:
        for process in running:
            process.kill()
            process.wait()


def train(
    folder: Path,
    framework: str,
    world: int,
    jobs: Sequence[dict[str, Any]],
    *,
    devices: int = 1,
    seconds: float = 200,
) -> list[list[dict[str, Any]]]:
    """The results of jobs by process. AssertionError with the messages if one ends without."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{**job, "options": job["options"].to_dict()} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(plain))
    logs = [folder / f"{number}.txt" for number in range(world)]
    environment = environments(framework, world, devices)
    running = [
        started([__file__, str(folder), str(number), str(seconds)], environment[number], log)
        for number, log in enumerate(logs)
    ]
    codes = ended(running, seconds)
    assert codes == [0] * world, "\n".join(log.read_text()[-4000:] for log in logs)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(world)]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[3]), exit=True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
