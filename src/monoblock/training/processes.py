"""The processes of a run: one, or those that a launcher such as torchrun, or a cluster, started."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, NamedTuple

from monoblock.pipelines import frameworks
from monoblock.training.options import TrainingOptions


class Processes:
    """One process, which agrees with itself; the base of several, whose methods all of them call in the same order.

    `rows` of them divide the rows of a batch between them; this one has part number `row`. The others, of a tensor
    axis, have the rows of one of these.
    """

    rank, size = 0, 1
    row, rows = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def agreed(self, value: Any) -> Any:
        """The value of the first process."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of them."""
        return flag

    def collected(self, value: Any) -> list[Any] | None:
        """In the first process, the values of those that divide the rows, in order; None in others."""
        return [value]

    def seed_step(self, seed: int, step: int) -> None:
        """Make random numbers a function of seed, step and part of the rows. One process keeps its generator."""

    def failure(self, error: BaseException) -> str | None:
        """The message of an error that ends this process; None if another one has reported the first error."""
        return str(error)

    def leave(self) -> None:
        """Leave the others, at the end of the program."""


class Launch(NamedTuple):
    """What a launcher tells a process: its number, that of all, and the address (HOST:PORT) at which they meet."""

    rank: int = 0
    size: int = 1
    address: str | None = None


JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TF_CONFIG = "TF_CONFIG"


def launch(framework: str = "pt") -> Launch:
    """The processes that a launcher started for a framework: by torchrun's variables; for JAX also by
    JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS; for TensorFlow by TF_CONFIG. ValueError: these are
    no such values."""
    if framework == "tf":
        return _of_tf_config()
    if framework == "flax" and any(name in os.environ for name in JAX_VARIABLES[1:]):
        return _of_jax()
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return Launch()
    found = _numbers(("RANK", rank), ("WORLD_SIZE", size), "start the command by torchrun")
    return Launch(*found, _meeting())


def _meeting() -> str | None:
    """The address in torchrun's variables; a port beside that of torchrun's own store, if its agent has that."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not (port.isascii() and port.isdigit()):
        return None
    taken = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get(JAX_VARIABLES[0]) or f"{host}:{int(port) + taken}"


def _of_jax() -> Launch:
    address, size, rank = (os.environ.get(name, "") for name in JAX_VARIABLES)
    how = f"set {', '.join(JAX_VARIABLES)}"
    found = _numbers((JAX_VARIABLES[2], rank), (JAX_VARIABLES[1], size), how)
    if found[1] > 1 and not re.fullmatch(r"(\[[\da-fA-F:.]+\]|[^\s:]+):\d{1,5}", address):
        raise ValueError(
            f"{JAX_VARIABLES[0]}={address} must be HOST:PORT of the first process, for {found[1]} processes"
        )
    return Launch(*found, address or None)


def _of_tf_config() -> Launch:
    """The workers of TF_CONFIG; a chief is the first one."""
    text = os.environ.get(TF_CONFIG)
    if not text:
        return Launch()
    try:
        found = json.loads(text)
        cluster, task = found.get("cluster", {}), found.get("task", {})
        counts = {kind: len(cluster.get(kind, [])) for kind in ("chief", "worker")}
        kind, index = task.get("type", "worker"), int(task.get("index", 0))
        others = sorted(set(cluster) - counts.keys())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{TF_CONFIG} of the environment is no description of workers: {error}") from None
    size = sum(counts.values())
    if size <= 1 and not others:
        return Launch()
    if others or kind not in counts:
        raise ValueError(
            f"{TF_CONFIG} of the environment has a {(others or [kind])[0]}: framework=tf trains with the tasks "
            "chief and worker only"
        )
    rank = index + (counts["chief"] if kind == "worker" else 0)
    if not 0 <= rank < size or index >= counts[kind]:
        raise ValueError(f"{TF_CONFIG} of the environment: there is no {kind} {index} among {counts[kind]}")
    return Launch(rank, size)


def _numbers(rank: tuple[str, str], size: tuple[str, str], how: str) -> tuple[int, int]:
    """The number of a process and of all from two variables; ValueError: they are none."""
    values = [rank[1], size[1]]
    if not all(value.isascii() and value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
        raise ValueError(
            f"{rank[0]}={rank[1]} and {size[0]}={size[1]} of the environment must be the number of this process and of "
            f"all: {how}, or unset them"
        )
    return int(values[0]), int(values[1])


def reports(framework: str = "pt") -> bool:
    """Whether this process reports what all processes of its machine find alike before they are joined."""
    try:
        found, torchrun = launch(framework), launch()
    except ValueError:
        return True
    if torchrun.size > 1:
        return os.environ.get("LOCAL_RANK", str(torchrun.rank)) == "0"
    return found.rank == 0


def processes(options: TrainingOptions) -> Processes:
    """The processes that train with these options; joins the others if a launcher started several. ValueError: their
    number does not fit the options."""
    started = launch(options.framework)
    if options.framework == "pt":
        return _of_torch(options, started)
    if options.framework == "tf":
        if started.size == 1 and (count := launch().size) > 1:
            raise ValueError(
                f"framework=tf finds its workers in the environment variable {TF_CONFIG}, but a launcher started "
                f"{count} processes without it: set it in each of them (docs/training.md)"
            )
        if options.batch_size < started.size:
            raise ValueError(_too_few_rows(options, started.size))
    if started.size == 1 and not options.has_mesh and not (options.framework == "flax" and _jax_is_joined()):
        return Processes()
    joining = frameworks.chosen(options.framework, "fine-tuning").training_processes
    return joining.join(options, started)


def _jax_is_joined() -> bool:
    """Whether the program has called jax.distributed.initialize."""
    return "jax" in sys.modules and frameworks.chosen("flax").training_processes.joined()


def _of_torch(options: TrainingOptions, started: Launch) -> Processes:
    tensor, count = options.tensor_parallel, started.size
    if count == 1:
        if tensor > 1:
            raise ValueError(
                f"tensor_parallel={tensor} needs as many processes: start the command by torchrun --nproc-per-node "
                f"{tensor} -m monoblock finetune ..."
            )
        return Processes()
    if count % tensor:
        raise ValueError(f"tensor_parallel={tensor} must divide the number of processes, {count}")
    if options.batch_size < count // tensor:
        raise ValueError(_too_few_rows(options, count // tensor))
    if options.merge and options.divides_weights:
        raise ValueError(
            "merge needs whole weights, which parallel=fsdp divides: use parallel=ddp, or drop merge and merge the "
            "adapter afterwards in one process"
        )
    return frameworks.chosen(options.framework, "fine-tuning").training_processes.join(options)


def _too_few_rows(options: TrainingOptions, count: int) -> str:
    return (
        f"batch_size={options.batch_size} is divided over {count} processes: give at least one row for each"
    )
