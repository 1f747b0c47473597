"""The processes of a run: one, or those that torchrun or accelerate started."""

from __future__ import annotations

import os
from typing import Any

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


def launched() -> int:
    """The number of processes that a launcher such as torchrun started, this one included. ValueError: its environment
    variables are no numbers."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 1
    values = [os.environ["RANK"], os.environ["WORLD_SIZE"]]
    if not all(value.isascii() and value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
        raise ValueError(
            f"RANK={values[0]} and WORLD_SIZE={values[1]} of the environment must be the number of this process and of "
            "all: start the command by torchrun, or unset them"
        )
    return int(values[1])


def reports() -> bool:
    """Whether this process reports what all processes of its machine find alike before they are joined."""
    return launched() == 1 or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"


def processes(options: TrainingOptions) -> Processes:
    """The processes that train with these options; joins the others if a launcher started several. ValueError: their
    number does not fit the options."""
    count = launched()
    if count == 1:
        if options.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel={options.tensor_parallel} needs as many processes: start the command by torchrun "
                f"--nproc-per-node {options.tensor_parallel} -m monoblock finetune ..."
            )
        return Processes()
    if options.framework != "pt":
        raise ValueError(
            f"framework={options.framework} trains in one process, but {count} were started: use framework=pt, or a "
            "mesh in a training loop of your own (docs/jax.md)"
        )
    tensor = options.tensor_parallel
    if count % tensor:
        raise ValueError(f"tensor_parallel={tensor} must divide the number of processes, {count}")
    if options.batch_size < count // tensor:
        raise ValueError(
            f"batch_size={options.batch_size} is divided over {count // tensor} processes: give at least one row for "
            "each"
        )
    if options.merge and options.divides_weights:
        raise ValueError(
            "merge needs whole weights, which parallel=fsdp divides: use parallel=ddp, or drop merge and merge the "
            "adapter afterwards in one process"
        )
    return frameworks.chosen(options.framework, "fine-tuning").training_processes.join(options)
