"""A model that several processes train: its weights by FSDP2 or replicated, and the gradients of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from monoblock.backends.pytorch.parallel import files, gradients
from monoblock.backends.pytorch.parallel.layout import TensorLayout, layout
from monoblock.backends.pytorch.training import memory
from monoblock.backends.pytorch.training.processes import TorchProcesses
from monoblock.training.options import TrainingOptions
from monoblock.training.tasks.base import NotFinite

BUCKET = 1 << 23  # values of replicated gradients that are summed at a time; 32 MB


class CalledModule(nn.Module):
    """The root that FSDP2 gathers parameters for: a step calls functions of parts of the model, not its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        """The result of the function, which finds whole parameters in the module."""
        return function()


class SharedModel:
    """A model in all processes. `module`: the model, or the module that contains it."""

    def __init__(
        self, processes: TorchProcesses, options: TrainingOptions, model: Any, module: nn.Module | None = None
    ) -> None:
        self.processes, self.options, self.model = processes, options, model
        self.root: Any = CalledModule(module or model)
        self.fsdp = options.divides_weights and processes.rows > 1
        if self.fsdp:
            mesh = processes.group.mesh["data"]
            if processes.device.type == "cpu":  # gathered weights come and go
                memory.return_large_blocks()
            # The sums of gradients are float32, also for bfloat16 weights.
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
            for block in model.get_submodule(model.module_path("layers")):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(self.root, mesh=mesh, mp_policy=policy)
        tensor = processes.group.size > 1
        self.shards = dict(files.named_shards(model)) if tensor else {}
        self.divided = gradients.sharded(model) if tensor else set[int]()

    def run(self, function: Callable[[], Any]) -> Any:
        """The result of a function that calls the model. All processes run it together."""
        if not self.fsdp:
            return function()
        found = self.root(function)
        if not torch.is_grad_enabled():
            self.root.reshard()  # as the backward pass does
        return found

    def rows(self, count: int, row: int | None = None) -> slice:
        """The rows of this process, or of part number `row`, of a batch with this number of them; there may be none."""
        rows = self.processes.rows
        part: int = self.processes.row if row is None else row
        return slice(count * part // rows, count * (part + 1) // rows)

    def layout(self, name: str, parameter: Tensor) -> TensorLayout:
        """The part of a parameter that this process holds."""
        return layout(parameter, self.shards.get(name), self.processes.group)

    def backward(
        self,
        batches: Sequence[Any],
        loss_of: Callable[[Any, slice], Tensor],
        count: int,
        parameters: Iterable[nn.Parameter],
    ) -> float:
        """Add the gradients of the sum of the batches' losses divided by `count`, and return this loss.
        `loss_of(batch, rows)` is the loss of some rows. Gradients are exchanged after the last batch only. NotFinite:
        a loss is no finite number, in all processes alike."""
        processes = self.processes
        found = torch.zeros(len(batches), dtype=torch.float64, device=processes.device)
        # FSDP2 divides the sums of gradients by the number of processes.
        factor = processes.rows if self.fsdp else 1
        for number, batch in enumerate(batches):
            if self.fsdp:
                self.root.set_requires_gradient_sync(number == len(batches) - 1)
            rows = self.rows(len(batch))
            loss = self.run(lambda batch=batch, rows=rows: loss_of(batch, rows)) / count
            found[number] = loss.detach()
            (loss * factor).backward()
        if not self.fsdp and processes.rows > 1:
            self._sum_gradients(list(parameters))
        values = processes.sum_(found).tolist()
        for number, value in enumerate(values):
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value}", number)
        return sum(values)

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over the processes, in float32."""
        trained = [p for p in parameters if p.requires_grad]
        there = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
        there = there.to(self.processes.device)
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=self.processes.data)
        bucket: list[Tensor] = []
        for parameter, has in zip(trained, there.tolist(), strict=True):
            if not has:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(x.numel() for x in bucket) >= BUCKET:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([x.reshape(-1).float() for x in bucket])
        self.processes.sum_(flat)
        for x, values in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            x.copy_(values.view(x.shape))

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """The norm of all gradients, the same in all processes, which are then clipped to `max_grad_norm`."""
        limit = self.options.max_grad_norm or math.inf
        return float(gradients.clip_parameters(parameters, self.divided, self.processes.group, limit))

    def save(self, folder: Path) -> None:
        """Write the files of the model: the first process writes them, and gathers one tensor at a time. Of an adapter,
        which is small, all."""
        model, group = self.model, self.processes.group
        if model._hf_peft_config_loaded:
            state = {name: _whole(x) for name, x in model.get_adapter_state_dict().items()}
            if self.processes.first:
                model.save_adapter(folder, state)
        elif self.fsdp or self.shards:
            with files.whole_tensors(model, group) as whole:
                if whole is not None:
                    model.write_tensors(folder, whole)
        elif self.processes.first:
            model.save_pretrained(folder)


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class _JoinedRows(torch.autograd.Function):
    """The rows of all processes; the gradient of the process's own rows is that of its own loss of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], processes: TorchProcesses) -> Tensor:
        start = sum(counts[: processes.row])
        ctx.rows = slice(start, start + counts[processes.row])
        own = x.new_zeros((max(counts), *x.shape[1:]))
        own[: len(x)] = x
        found = [torch.empty_like(own) for _ in counts]
        dist.all_gather(found, own, group=processes.data)
        return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][ctx.rows], None, None


def joined_rows(x: Tensor, counts: list[int], processes: TorchProcesses) -> Tensor:
    """The rows of all processes, which have `counts` of them, in order. Each process computes the same loss of all and
    propagates the gradient of its own rows."""
    return _JoinedRows.apply(x, counts, processes) if sum(counts) else x  # pyright: ignore[reportReturnType]
