"""What the trainer needs of PyTorch: a model on its device, steps, evaluation, and the files of a checkpoint."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import monoblock
from monoblock.backends.pytorch.parallel.layout import TensorLayout, local
from monoblock.backends.pytorch.pipeline_adapter import found_device
from monoblock.backends.pytorch.training import batches, lora, losses, memory
from monoblock.backends.pytorch.training.optimizer import Optimizer, random_state, restore_random_state
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.packed_config import BITSANDBYTES
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.errors import CheckpointError
from monoblock.seeds import set_seed
from monoblock.training.checkpoints import SHARED
from monoblock.training.options import TrainingOptions
from monoblock.training.padding import pad_id
from monoblock.training.processes import Processes
from monoblock.training.tasks.base import Example, NotFinite, Task, TokenRow

if TYPE_CHECKING:
    from monoblock.backends.pytorch.training.shared import SharedModel
    from monoblock.backends.pytorch.training.shared_files import Held

_STATE = "training"  # the subfolder of a checkpoint with optimizer and random states
_RANDOM = "random:"
_WEIGHTS, _OPTIMIZER = "weights:", "optimizer:"  # names of tensors in files of several processes

Units = Sequence[Sequence[Example]]


class Learner:
    """A model that is trained, or only evaluated (`train=False`).

    `source`: the folder or name of the weights; `base`: those under an adapter, whose files are in `source` if it
    differs. `fields`: of the config. `processes`: those that train it.
    """

    shared: SharedModel | None = None  # of several processes
    padded_to: int | None = None  # the number of tokens of a row; None: as many as the longest

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        fields: Mapping[str, Any],
        *,
        source: str,
        base: str,
        train: bool = True,
        processes: Processes | None = None,
    ) -> None:
        self.task, self.options, self.base = task, options, base
        self.processes: Any = processes or Processes()
        set_seed(options.seed)
        if self.processes.size > 1:
            self.device: torch.device = self.processes.device
        else:
            self.device = found_device(None if options.device == "auto" else options.device)
        self.adapted = train and options.lora_rank is not None
        self.model: Any = self._load(base if self.adapted else source, fields)
        self.tokenizer = task.tokenizer
        self.pad = pad_id(self.tokenizer)
        self.optimizer: Optimizer | None = None
        if train:
            self._prepare(source if self.adapted and source != base else None)

    def _load(self, source: str, fields: Mapping[str, Any]) -> Any:
        auto = getattr(monoblock, self.task.auto)
        options: dict[str, Any] = {"dtype": self.options.dtype, **self.options.hub(source)}
        if fields:  # a head for other labels is initialised
            options["ignore_mismatched_sizes"] = True
        if self.options.quantize is not None:
            options["quantization_config"] = self.options.quantize
        elif self.adapted and self._keeps_four_bits(source):
            options["load_in_4bit"] = True
        if self.options.tensor_parallel > 1:
            options |= {"tp_plan": "auto", "device_mesh": self.processes.group.mesh}
        return auto.from_pretrained(source, **options, **fields).to(self.device)

    def _keeps_four_bits(self, source: str) -> bool:
        """Whether weights that bitsandbytes stored in 4 bits stay so under an adapter. Merging and DoRA need the
        weights themselves, and FSDP2 divides them."""
        options = self.options
        if options.merge or options.dora:
            return False
        if self.processes.size > 1 and options.divides_weights:
            return False
        config = monoblock.AutoConfig.from_pretrained(source, **options.hub(source))
        how = getattr(config, "quantization_config", None) or {}
        return how.get("quant_method") == BITSANDBYTES and bool(how.get("load_in_4bit"))

    def _prepare(self, adapter: str | None) -> None:
        """Choose what is trained."""
        model, options = self.model, self.options
        if options.lora_rank is not None:
            model.requires_grad_(False)
            if adapter is None:
                lora.add(model, options)
            else:
                model.load_adapter(adapter, is_trainable=True)
        parameters = self.parameters()
        for pattern in options.freeze:
            if not (frozen := fnmatch.filter(parameters, pattern)):
                raise ValueError(
                    f"freeze: no parameter is named {pattern!r}; they are named like {next(iter(parameters))!r}"
                )
            for name in frozen:
                parameters[name].requires_grad_(False)
        if options.lora_rank is None and model.quantization_config is not None:
            raise ValueError(
                f"the weights of {self.base} are quantised, so that only an adapter can be trained: set lora_rank"
            )
        if not any(p.requires_grad for p in parameters.values()):
            raise ValueError("freeze leaves no parameter to train")
        if options.gradient_checkpointing:
            if model.quantization_config is not None:  # memory decides
                memory.return_large_blocks()
            model.gradient_checkpointing_enable()
        model.train()
        if self.processes.size > 1:
            self.shared = self._share(model)
        self.optimizer = Optimizer(self.parameters(), options)
        # Again, so that dropout does not depend on how many weights were initialised.
        set_seed(options.seed)

    def _share(self, model: Any) -> SharedModel:
        """Divide a model over the processes, or prepare its copies."""
        from monoblock.backends.pytorch.training.shared import SharedModel

        return SharedModel(self.processes, self.options, model)

    def _run(self, function: Callable[[], Any]) -> Any:
        """The result of a function that calls the model; several processes run it together."""
        return function() if self.shared is None else self.shared.run(function)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return dict(self.model.named_parameters())

    def count(self) -> tuple[int, int]:
        """The numbers of parameters: trained, and all."""
        sizes = {name: math.prod(self._layout(name, p).shape) for name, p in self.parameters().items()}
        trained = sum(sizes[name] for name, p in self.parameters().items() if p.requires_grad)
        every = self.model.num_parameters() if self.model.tensor_group is None else sum(sizes.values())
        return trained, max(trained, every)

    def _layout(self, name: str, parameter: Tensor) -> TensorLayout:
        """The part of a parameter that this process holds."""
        if self.shared is None:
            return TensorLayout.whole(tuple(parameter.shape))
        return self.shared.layout(name, parameter)

    # ------------------------------------------------------------------ steps

    def step(self, units: Sequence[Units], learning_rate: float) -> tuple[float, float]:
        """One step over batches of units (rows of one or several examples): the mean loss, and the gradients' norm
        before clipping. NotFinite, before the weights change: one of them is no finite number."""
        assert self.optimizer is not None
        count = max(1, sum(self.task.weight(e) for batch in units for unit in batch for e in unit))
        parameters = self.optimizer.parameters.values()
        if self.shared is not None:
            total = self.shared.backward(units, self._loss_of_rows, count, parameters)
            norm = self.shared.gradient_norm(parameters)
        else:
            total = self._backward(units, count)
            norm = self.optimizer.gradient_norm()
        if not math.isfinite(norm):
            raise NotFinite(f"the norm of the gradients is {norm}")
        self.optimizer.step(learning_rate)
        return total, norm

    def _backward(self, units: Sequence[Units], count: int) -> float:
        """Add the gradients of the sum of the batches' losses divided by `count`, and return this loss."""
        total = 0.0
        for number, batch in enumerate(units):
            loss = self._loss(batch) / count
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value}", number)
            loss.backward()
            total += value
        return total

    def _loss_of_rows(self, batch: Units, rows: slice) -> Tensor:
        """The sum of the losses of some rows of a batch. Without rows it is 0, and has gradients that are 0, since all
        processes exchange gradients."""
        own = batch[rows]
        if len(self.task.targets) > 1:  # the softmax of a span is over all tokens, padding too
            self.padded_to = max(example.tokens for unit in batch for example in unit)
        try:
            return self._loss(own) if own else self._loss(batch[:1]) * 0
        finally:
            self.padded_to = None

    def _loss(self, batch: Units) -> Tensor:
        """The sum of a batch's losses."""
        given, labels = self._inputs(batch)
        if labels is not None:
            return losses.token_loss(self.model, given, labels, self.model.row.head == "causal")
        count = sum(self.task.weight(example) for unit in batch for example in unit)
        return self.model(**given, **batches.targets(batch, self.task.targets, self.device)).loss * count

    def _inputs(self, batch: Units) -> tuple[dict[str, Any], Tensor | None]:
        return self._tensors([[row for example in unit for row in example.rows] for unit in batch])

    def _tensors(self, rows: Sequence[Sequence[TokenRow]]) -> tuple[dict[str, Any], Tensor | None]:
        """The model's arguments, and the labels of tokens."""
        given, labels = batches.inputs(rows, self.model, self.pad, self.padded_to)
        if "use_cache" in self.model.row.forward.split():
            given["use_cache"] = False
        return given, labels

    def evaluate(self, examples: Sequence[Example]) -> tuple[float, list[Any]]:
        """The sum of the losses of a batch, and the outputs of each example that the task needs."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._run(lambda: self._evaluated([[example] for example in examples]))
        finally:
            self.model.train(training)

    def _evaluated(self, batch: Units) -> tuple[float, list[Any]]:
        given, labels = self._inputs(batch)
        counts = [example.tokens for (example,) in batch]
        if labels is not None:
            causal = self.model.row.head == "causal"
            if self.task.outputs != "best":
                return float(losses.token_loss(self.model, given, labels, causal)), [None] * len(batch)
            loss, best_bs = losses.token_predictions(self.model, given, labels)
            return loss, [row[:n] for row, n in zip(best_bs.cpu().numpy(), counts, strict=True)]
        out = self.model(**given, **batches.targets(batch, self.task.targets, self.device))
        loss = float(out.loss) * sum(self.task.weight(example) for (example,) in batch)
        if len(self.task.targets) == 1:
            return loss, list(_numpy(out.logits))
        spans = zip(_numpy(out.start_logits), _numpy(out.end_logits), counts, strict=True)
        return loss, [(start[:n], end[:n]) for start, end, n in spans]

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The ids, at most `tokens`, that continue a prompt, each the most probable one."""
        training = self.model.training
        self.model.eval()
        try:
            prompt = torch.tensor([list(ids)], device=self.device)
            with torch.no_grad():
                found = self._run(
                    lambda: self.model.generate(
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=tokens,
                        do_sample=False,
                        num_beams=1,
                        pad_token_id=self.pad,
                    )
                )
        finally:
            self.model.train(training)
        return found[0, len(ids) :].tolist()

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write the model, or its adapter, and the tokenizer. All processes call it."""
        if self.shared is not None:
            self.shared.save(folder)
        else:
            self.model.save_pretrained(folder)
        if self.processes.first:
            self.tokenizer.save_pretrained(folder)

    def finish(self) -> None:
        """Merge the adapter, if that is an option."""
        if self.options.merge:
            lora.merge(self.model)

    def save_state(self, folder: Path) -> None:
        """Write the states of the optimizer and of the random generators into a checkpoint."""
        assert self.optimizer is not None
        state = {**self.optimizer.state()}
        state |= {f"{_RANDOM}{name}": value for name, value in random_state(self.device).items()}
        save_tensors(folder / _STATE, {name: x.cpu().clone() for name, x in state.items()}, framework="pt")

    def start_saving(self, folder: Path, *, weights_only: bool = False) -> Any:
        """Begin to write weights and optimizer as files of several processes; the future of the end."""
        from monoblock.backends.pytorch.training import shared_files

        assert self.optimizer is not None
        states = self._weights()
        if not weights_only:
            for key, value in self.optimizer.state().items():
                states[f"{_OPTIMIZER}{key}"] = shared_files.Held(self._layout_of_state(key), value)
        return shared_files.start(folder, states, self.processes.files)

    def _weights(self) -> dict[str, Held]:
        """The weights by their names in files of several processes; of an adapter, only what is trained."""
        from monoblock.backends.pytorch.training.shared_files import Held

        adapter = self.options.lora_rank is not None
        return {
            f"{_WEIGHTS}{name}": Held(self._layout(name, parameter), local(parameter))
            for name, parameter in self.parameters().items()
            if parameter.requires_grad or not adapter
        }

    def _layout_of_state(self, key: str) -> TensorLayout:
        """The part of a state of the optimizer, `parameter/state`, that this process holds."""
        assert self.optimizer is not None
        name, _, part = key.rpartition("/")
        if name not in self.optimizer.parameters:
            raise CheckpointError(f"the checkpoint's optimizer has {key!r}, which this run does not train")
        shape, _ = self.optimizer.form(key)
        if part == "step" or name in self.optimizer.quantized:  # are not divided
            return TensorLayout.whole(shape)
        return self._layout(name, self.optimizer.parameters[name])

    def _empty_state(self, key: str, dtype: torch.dtype) -> tuple[TensorLayout, Tensor]:
        """The layout of a state of the optimizer, and memory for this process's part."""
        assert self.optimizer is not None
        layout = self._layout_of_state(key)
        return layout, torch.empty(self.optimizer.form(key)[0], dtype=dtype)

    def restore(self, folder: Path) -> None:
        """Set the states of a checkpoint. Its weights are loaded already, if one process wrote it."""
        assert self.optimizer is not None
        if (folder / SHARED).is_dir():
            self._restore_shared(folder)
            return
        store = open_store(find_weights(folder / _STATE), "pt")
        state: dict[str, Tensor] = {}
        for key in store:
            if self.shared is None or key.startswith(_RANDOM):
                state[key] = store.tensor(key).clone()
                continue
            layout, state[key] = self._empty_state(key, store.tensor(key).dtype)
            layout.copy(store.tensor(key), state[key])
        random = {name.removeprefix(_RANDOM): x for name, x in state.items() if name.startswith(_RANDOM)}
        self.optimizer.restore({name: x for name, x in state.items() if not name.startswith(_RANDOM)})
        if self.shared is None:  # several processes set their generators in each step
            restore_random_state(random, self.device)

    def _restore_shared(self, folder: Path) -> None:
        """Set weights and optimizer to those that several processes wrote; a single process keeps its generators."""
        from monoblock.backends.pytorch.training import shared_files

        assert self.optimizer is not None
        self._load_shared(folder)
        states: dict[str, Held] = {}
        for key, (_, dtype) in shared_files.stored(folder).items():
            if key.startswith(_OPTIMIZER):
                states[key] = shared_files.Held(*self._empty_state(key.removeprefix(_OPTIMIZER), dtype))
        shared_files.read(folder, states, getattr(self.processes, "files", None))
        self.optimizer.restore({key.removeprefix(_OPTIMIZER): held.tensor for key, held in states.items()})

    def _load_shared(self, folder: Path) -> None:
        from monoblock.backends.pytorch.training import shared_files

        shared_files.read(folder, self._weights(), getattr(self.processes, "files", None))

    def load_weights(self, folder: Path) -> None:
        """Set the weights, or those of the adapter, to those of a folder that `save` or `start_saving` wrote."""
        if (folder / SHARED).is_dir():
            self._load_shared(folder)
            return
        if self.options.lora_rank is not None:
            lora.set_weights(self.model, folder)
            return
        other = type(self.model).from_pretrained(folder, dtype=self.options.dtype)
        self.model.load_state_dict(other.state_dict())


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
