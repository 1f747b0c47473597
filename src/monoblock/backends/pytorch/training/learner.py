"""What the trainer needs of PyTorch: a model on its device, steps, evaluation, and the files of a checkpoint."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import monoblock
from monoblock.backends.pytorch.pipeline_adapter import found_device
from monoblock.backends.pytorch.training import batches, lora, losses, memory
from monoblock.backends.pytorch.training.optimizer import Optimizer, random_state, restore_random_state
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.seeds import set_seed
from monoblock.training.options import TrainingOptions
from monoblock.training.padding import pad_id
from monoblock.training.tasks.base import Example, NotFinite, Task, TokenRow

_STATE = "training"  # the subfolder of a checkpoint with optimizer and random states
_RANDOM = "random:"

Units = Sequence[Sequence[Example]]


class Learner:
    """A model that is trained, or only evaluated (`train=False`).

    `source`: the folder or name of the weights; `base`: those under an adapter, whose files are in `source` if it
    differs. `fields`: of the config.
    """

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        fields: Mapping[str, Any],
        *,
        source: str,
        base: str,
        train: bool = True,
    ) -> None:
        self.task, self.options, self.base = task, options, base
        set_seed(options.seed)
        self.device = found_device(None if options.device == "auto" else options.device)
        adapted = train and options.lora_rank is not None
        self.model: Any = self._load(base if adapted else source, fields)
        self.tokenizer = task.tokenizer
        self.pad = pad_id(self.tokenizer)
        self.optimizer: Optimizer | None = None
        if train:
            self._prepare(source if adapted and source != base else None)

    def _load(self, source: str, fields: Mapping[str, Any]) -> Any:
        auto = getattr(monoblock, self.task.auto)
        options: dict[str, Any] = {"dtype": self.options.dtype, **self.options.hub(source)}
        if fields:  # a head for other labels is initialised
            options["ignore_mismatched_sizes"] = True
        if self.options.quantize is not None:
            options["quantization_config"] = self.options.quantize
        return auto.from_pretrained(source, **options, **fields).to(self.device)

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
            if options.quantize is not None:  # memory decides
                memory.return_large_blocks()
            model.gradient_checkpointing_enable()
        model.train()
        self.optimizer = Optimizer(parameters, options)
        # Again, so that dropout does not depend on how many weights were initialised.
        set_seed(options.seed)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return dict(self.model.named_parameters())

    def count(self) -> tuple[int, int]:
        """The numbers of parameters: trained, and all."""
        trained = sum(p.numel() for p in self.parameters().values() if p.requires_grad)
        return trained, max(trained, self.model.num_parameters())

    # ------------------------------------------------------------------ steps

    def step(self, units: Sequence[Units], learning_rate: float) -> tuple[float, float]:
        """One step over batches of units (rows of one or several examples): the mean loss, and the gradients' norm
        before clipping. NotFinite, before the weights change: one of them is no finite number."""
        assert self.optimizer is not None
        count = max(1, sum(self.task.weight(e) for batch in units for unit in batch for e in unit))
        total = 0.0
        for number, batch in enumerate(units):
            loss = self._loss(batch) / count
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value}", number)
            loss.backward()
            total += value
        norm = self.optimizer.gradient_norm()
        if not math.isfinite(norm):
            raise NotFinite(f"the norm of the gradients is {norm}")
        self.optimizer.step(learning_rate)
        return total, norm

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
        given, labels = batches.inputs(rows, self.model, self.pad)
        if "use_cache" in self.model.row.forward.split():
            given["use_cache"] = False
        return given, labels

    def evaluate(self, examples: Sequence[Example]) -> tuple[float, list[Any]]:
        """The sum of the losses of a batch, and the outputs of each example that the task needs."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._evaluated([[example] for example in examples])
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
            found = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.pad,
            )
        finally:
            self.model.train(training)
        return found[0, len(ids) :].tolist()

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write the model, or its adapter, and the tokenizer."""
        self.model.save_pretrained(folder)
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

    def restore(self, folder: Path) -> None:
        """Set the states of a checkpoint, whose weights are loaded already."""
        assert self.optimizer is not None
        store = open_store(find_weights(folder / _STATE), "pt")
        state: dict[str, Tensor] = {name: store.tensor(name).clone() for name in store}
        random = {name.removeprefix(_RANDOM): x for name, x in state.items() if name.startswith(_RANDOM)}
        self.optimizer.restore({name: x for name, x in state.items() if not name.startswith(_RANDOM)})
        restore_random_state(random, self.device)

    def load_weights(self, folder: Path) -> None:
        """Set the weights, or those of the adapter, to those of a folder that `save` wrote."""
        if self.options.lora_rank is not None:
            lora.set_weights(self.model, folder)
            return
        other = type(self.model).from_pretrained(folder, dtype=self.options.dtype)
        self.model.load_state_dict(other.state_dict())


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
