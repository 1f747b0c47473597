"""The base of all pipelines: inputs to rows, rows to batches, and model outputs to results, as a stream."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines import frameworks
from monoblock.pipelines.arrays import PipelineBackend
from monoblock.pipelines.progress import with_progress_bar

NO_LIMIT = 10**20  # a larger model_max_length of a tokenizer stands for an unknown one


@dataclass
class PipelineInput:
    """One row of a batch: the model's inputs, data that `answer` needs, and the model's output."""

    inputs: dict[str, Any]
    info: Any = None
    output: dict[str, Any] = field(default_factory=dict)


class KeyDataset:
    """A dataset's column: `KeyDataset(data, "text")[i]` is `data[i]["text"]`."""

    def __init__(self, dataset: Any, key: str) -> None:
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index][self.key]


class Pipeline:
    """A model with the preprocessing of its inputs and the postprocessing of its outputs; call it with inputs.

    A list returns a list of results. A dataset (anything else with a length and indices) or an iterator returns an
    iterator of results, computed lazily in batches of `batch_size` rows; results do not depend on the batch size.
    Options of the constructor are the defaults of every call.
    """

    task: ClassVar[str]
    heads: ClassVar[tuple[str | None, ...]] = ()  # supported kinds of head; empty: any
    settings: ClassVar[dict[str, Any]] = {}  # the options, with their defaults
    more: ClassVar[frozenset[str]] = frozenset()  # options that are passed on, without a default here

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        image_processor: Any = None,
        processor: Any = None,
        device: Any = None,
        batch_size: int = 1,
        **settings: Any,
    ) -> None:
        self.model, self.processor = model, processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
        self.image_processor: Any = (
            getattr(processor, "image_processor", None) if image_processor is None else image_processor
        )
        self.adapter: PipelineBackend = frameworks.of_model(model).adapter.Adapter(model, device)
        if self.heads and model.row.head not in self.heads:
            raise ValueError(
                f"{model.row.name} does not support {self.task!r}: that needs a head of the kind "
                + " or ".join(map(repr, self.heads))
            )
        if self.tokenizer is None:
            raise ValueError(f"{self.task!r} needs a tokenizer: pass tokenizer= with a model object")
        self.batch_size = _count("batch_size", batch_size)
        self.given: dict[str, Any] = {}
        self.given = self.merged(settings)

    # ------------------------------------------------------------------ defined by each task

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        """The rows of model inputs of one input."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays that `answer` needs, [rows, ...]; [rows, tokens, ...] for those in `by_token`."""
        raise NotImplementedError

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        """The result of one input, from its rows."""
        raise NotImplementedError

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call, normalised; ValueError for invalid ones."""
        return options

    by_token: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------ calls

    @property
    def device(self) -> Any:
        """The model's device."""
        return self.adapter.device

    @property
    def dtype(self) -> Any:
        """The dtype of the model's computation."""
        return self.adapter.dtype

    @property
    def limit(self) -> int | None:
        """The maximum of tokens per row, from the tokenizer's files, else from the config; None: unlimited."""
        if self.tokenizer.model_max_length <= NO_LIMIT:
            return int(self.tokenizer.model_max_length)
        return self.model.max_positions

    def merged(self, call: dict[str, Any]) -> dict[str, Any]:
        """The constructor's options, overridden by the call's; TypeError for an unknown name."""
        known = [*self.settings, *self.more]
        for name in call:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, "batch_size"], 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it takes: {', '.join(self.settings)}"
                raise TypeError(f"{self.task!r} has no argument {name!r}{hint}")
        return {**self.given, **call}

    def __call__(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """The results for these inputs.

        batch_size: rows per forward pass. num_workers: None or 0, as inputs are prepared in this process.
        progress: whether to show a progress bar for many inputs; default: on a terminal. options: the task's own.
        """
        if num_workers:
            raise ValueError(f"num_workers={num_workers}: inputs are prepared in this process; leave it out")
        size = self.batch_size if batch_size is None else _count("batch_size", batch_size)
        chosen = self.checked({**self.settings, **self.merged(options)})
        inputs = self.items(inputs, chosen)
        if isinstance(inputs, list):
            return list(with_progress_bar(self.stream(inputs, size, chosen), len(inputs), progress))
        if is_stream(inputs):
            total = len(inputs) if hasattr(inputs, "__len__") else None
            return with_progress_bar(self.stream(_iterate(inputs), size, chosen), total, progress)
        return next(self.stream([inputs], size, chosen))

    predict = transform = __call__

    def items(self, inputs: Any, options: dict[str, Any]) -> Any:
        """A list of inputs, a stream of inputs, or one input; a tuple becomes a list."""
        del options
        return list(inputs) if isinstance(inputs, tuple) else inputs

    def stream(self, items: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        """Results in the order of the inputs, each as soon as its last row has been run."""
        groups: deque[list[PipelineInput]] = deque()
        waiting: list[PipelineInput] = []
        for item in items:
            groups.append(self.rows(item, options))
            waiting += groups[-1]
            while len(waiting) >= size:
                self._run(waiting[:size], options)
                del waiting[:size]
            while groups and all(row.output for row in groups[0]):
                yield self.answer(groups.popleft(), options)
        if waiting:
            self._run(waiting, options)
        while groups:
            yield self.answer(groups.popleft(), options)

    def _run(self, rows: list[PipelineInput], options: dict[str, Any]) -> None:
        batch = self.collate([row.inputs for row in rows])
        outputs = self.forward(batch, options)
        width = np.shape(batch["input_ids"])[-1]
        left = self.tokenizer.padding_side == "left"
        for i, row in enumerate(rows):
            length = len(row.inputs["input_ids"])
            real = slice(width - length, width) if left else slice(0, length)
            row.output = {k: v[i][real] if k in self.by_token else v[i] for k, v in outputs.items()}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows padded by the tokenizer to one length; rows of equal length stay as they are."""
        if len({len(row["input_ids"]) for row in rows}) == 1:
            return {name: [row[name] for row in rows] for name in rows[0]}
        return dict(self.tokenizer.pad(rows, return_attention_mask=True))

    def model_inputs(self, encoded: Mapping[str, Any], row: int | None = None) -> dict[str, Any]:
        """The tokenizer's outputs that the model takes: some tokenizers' files list token_type_ids for models without
        token types."""
        names = [
            name
            for name in encoded
            if name in self.tokenizer.model_input_names and name in self.adapter.accepts
        ]
        return {name: encoded[name] if row is None else encoded[name][row] for name in names}

    def save_pretrained(self, save_directory: Any) -> None:
        """Write the model and its tokenizer or processor to a folder."""
        self.model.save_pretrained(save_directory)
        (self.processor or self.tokenizer).save_pretrained(save_directory)

    def __repr__(self) -> str:
        dtype = str(self.dtype).rpartition(".")[2]
        return f"{type(self).__name__}: {self.model.row.name}, {dtype} on {self.device}"


def is_stream(inputs: Any) -> bool:
    """Whether `inputs` is a lazy collection: an iterator, or a dataset."""
    if isinstance(inputs, str | Mapping | Sequence):
        return False
    return isinstance(inputs, Iterator) or (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__"))


def _iterate(inputs: Any) -> Iterator[Any]:
    # By index: a PyTorch dataset need not raise IndexError at its end.
    return inputs if isinstance(inputs, Iterator) else (inputs[i] for i in range(len(inputs)))


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    return value


def count_or_none(name: str, value: Any) -> int | None:
    """An integer of at least 1, or None."""
    return None if value is None else _count(name, value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """`value` if it is one of `known`, in any case; enums of other libraries are compared by value."""
    found = str(getattr(value, "value", value)).lower()
    if found not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")
    return found


def text(value: Any, task: str) -> str:
    """`value` if it is a string, else TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{task!r} takes strings, or lists of them; got {type(value).__name__}")
    return value
