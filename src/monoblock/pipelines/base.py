"""What all pipelines share: inputs become rows, rows become batches, outputs become answers, one after the other."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines import frameworks
from monoblock.pipelines.arrays import Adapter
from monoblock.pipelines.progress import shown

NO_LIMIT = 10**20  # a tokenizer's model_max_length above this means that its files name none


@dataclass
class PipelineInput:
    """One row of a batch: the ids and masks that the model gets, what the answer needs beside, and the output."""

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
    """A model with what prepares its inputs and reads its outputs; call it with texts.

    A list gives a list of answers. A dataset (anything else with a length and indices) or an iterator gives an
    iterator of answers, made as they are asked for, `batch_size` rows at a time; answers do not depend on it.
    Settings given to the constructor hold for every call that does not give its own.
    """

    task: ClassVar[str]
    heads: ClassVar[tuple[str | None, ...]] = ()  # the kinds of head that it can use; none named: any
    settings: ClassVar[dict[str, Any]] = {}  # the arguments, with their defaults
    more: ClassVar[frozenset[str]] = frozenset()  # arguments that are passed on, without a default of ours

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
        self.adapter: Adapter = frameworks.of_model(model).adapter.Adapter(model, device)
        if self.heads and model.row.head not in self.heads:
            raise ValueError(
                f"{model.row.name} cannot do {self.task!r}: that needs a head of the kind "
                + " or ".join(map(repr, self.heads))
            )
        if self.tokenizer is None:
            raise ValueError(f"{self.task!r} needs a tokenizer: give tokenizer= beside a model object")
        self.batch_size = _count("batch_size", batch_size)
        self.given: dict[str, Any] = {}
        self.given = self.merged(settings)

    # ------------------------------------------------------------------ what a task defines

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        """One input as rows of model inputs."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        """The outputs that answers are made of, [rows, ...]; [rows, tokens, ...] for those in `by_token`."""
        raise NotImplementedError

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        """The answer to one input, from its rows."""
        raise NotImplementedError

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The settings of a call, put in order; ValueError for what cannot be."""
        return options

    by_token: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------ calls

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.adapter.device

    @property
    def dtype(self) -> Any:
        """The type that the model computes in."""
        return self.adapter.dtype

    @property
    def limit(self) -> int | None:
        """The tokens that fit in the model, by the tokenizer's files or else by the config; None: any number."""
        if self.tokenizer.model_max_length <= NO_LIMIT:
            return int(self.tokenizer.model_max_length)
        return self.model.max_positions

    def merged(self, call: dict[str, Any]) -> dict[str, Any]:
        """The constructor's settings with the call's over them; TypeError for a name that is not known."""
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
        """The answers to these inputs.

        batch_size: rows that the model gets at once. num_workers: None or 0, as inputs are prepared in this process.
        progress: whether to show a progress bar for many inputs; default: on a terminal. Others: the task's own.
        """
        if num_workers:
            raise ValueError(f"num_workers={num_workers}: inputs are prepared in this process; leave it out")
        size = self.batch_size if batch_size is None else _count("batch_size", batch_size)
        chosen = self.checked({**self.settings, **self.merged(options)})
        inputs = self.items(inputs, chosen)
        if isinstance(inputs, list):
            return list(shown(self.stream(inputs, size, chosen), len(inputs), progress))
        if is_stream(inputs):
            total = len(inputs) if hasattr(inputs, "__len__") else None
            return shown(self.stream(_iterate(inputs), size, chosen), total, progress)
        return next(self.stream([inputs], size, chosen))

    predict = transform = __call__

    def items(self, inputs: Any, options: dict[str, Any]) -> Any:
        """A list of inputs, a stream of them, or one; here a tuple is a list."""
        del options
        return list(inputs) if isinstance(inputs, tuple) else inputs

    def stream(self, items: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        """Answers in the order of the inputs, each as soon as its last row has been run."""
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
        """Rows padded to one length, as the tokenizer pads; rows of one length stay as they are."""
        if len({len(row["input_ids"]) for row in rows}) == 1:
            return {name: [row[name] for row in rows] for name in rows[0]}
        return dict(self.tokenizer.pad(rows, return_attention_mask=True))

    def model_inputs(self, encoded: Mapping[str, Any], row: int | None = None) -> dict[str, Any]:
        """What the model takes of what the tokenizer gave: some tokenizers' files name token types for models that
        have none."""
        names = [
            name
            for name in encoded
            if name in self.tokenizer.model_input_names and name in self.adapter.accepts
        ]
        return {name: encoded[name] if row is None else encoded[name][row] for name in names}

    def save_pretrained(self, save_directory: Any) -> None:
        """Write the model, and its tokenizer or processor, into a folder."""
        self.model.save_pretrained(save_directory)
        (self.processor or self.tokenizer).save_pretrained(save_directory)

    def __repr__(self) -> str:
        dtype = str(self.dtype).rpartition(".")[2]
        return f"{type(self).__name__}: {self.model.row.name}, {dtype} on {self.device}"


def is_stream(inputs: Any) -> bool:
    """Whether it holds many inputs that are made one by one: an iterator, or a dataset."""
    if isinstance(inputs, str | Mapping | Sequence):
        return False
    return isinstance(inputs, Iterator) or (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__"))


def _iterate(inputs: Any) -> Iterator[Any]:
    # By index: a PyTorch dataset need not raise IndexError at its end.
    return inputs if isinstance(inputs, Iterator) else (inputs[i] for i in range(len(inputs)))


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    return value


def count_or_none(name: str, value: Any) -> int | None:
    """A whole number of at least 1, or None."""
    return None if value is None else _count(name, value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """`value` if it is one of `known`, in any case; enums of other libraries count by their value."""
    found = str(getattr(value, "value", value)).lower()
    if found not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")
    return found


def text(value: Any, task: str) -> str:
    """`value` if it is a text."""
    if not isinstance(value, str):
        raise TypeError(f"{task!r} takes texts, or lists of them; got {type(value).__name__}")
    return value
