"""Texts to batches to vectors: tokenisation in a background thread, batches of similar length, and pooling."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.embeddings.transformer import Rows, Transformer

log = logging.getLogger("monoblock")

TEXTS = 2048  # of a chunk that is tokenised at once, at most
CHARACTERS = 10**6  # of a chunk, unless one text has more
AHEAD = 2  # chunks that wait for the model
UNLIMITED = 512  # tokens per text in a batch's budget if the model has no maximum


@dataclass
class Tokenized:
    """A text's tokens: its index in the input, the model's inputs, and the number of tokens cut."""

    index: int
    row: dict[str, list[int]]
    cut: int

    def __len__(self) -> int:
        return len(self.row["input_ids"])


@dataclass
class Encoded:
    """Texts after all modules: their indices in the input, and their features [texts, ...]."""

    indices: list[int]
    features: dict[str, Any]


class TextEncoder:
    """One call of `encode`: the transformer on batches of texts, then the other modules."""

    def __init__(
        self, transformer: Transformer, modules: Sequence[Callable[[Any], Any]], batch_size: int, prompt: str
    ) -> None:
        self.transformer, self.modules, self.batch_size, self.prompt = (
            transformer,
            modules,
            batch_size,
            prompt,
        )
        self.prompt_length = transformer.prompt_length(prompt) if prompt else 0
        self.budget = batch_size * (transformer.max_seq_length or UNLIMITED)
        self.packed = not self._more_inputs()
        self.cut: dict[int, int] = {}
        self.empty = 0

    def _more_inputs(self) -> bool:
        names = self.transformer.tokenizer.model_input_names
        return bool(set(names) & self.transformer.adapter.accepts - {"input_ids", "attention_mask"})

    def stream(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """The texts' features in batches, the longest texts first; the callable's fields count what was cut."""
        waiting: list[Tokenized] = []
        for chunk in self._tokenized(texts):
            for text in chunk:
                if text.cut:
                    self.cut[text.index] = text.cut
            waiting = sorted([*waiting, *chunk], key=len, reverse=True)
            while self._is_full(waiting):
                yield from self._next(waiting)
        while waiting:
            yield from self._next(waiting)

    def report(self, count: int) -> None:
        """Log a warning of the texts that were cut, and of those without tokens."""
        if self.cut:
            log.warning(
                "%d of %d texts have more than max_seq_length=%s tokens: %d tokens were cut; "
                "encode(..., return_truncated=True) gives their number for each text",
                len(self.cut),
                count,
                self.transformer.max_seq_length,
                sum(self.cut.values()),
            )
        if self.empty:
            log.warning("%d of %d texts have no tokens: their token states are 0", self.empty, count)

    # ------------------------------------------------------------------ texts to tokens

    def _tokenized(self, texts: Sequence[str]) -> Iterator[list[Tokenized]]:
        """The texts in chunks, by decreasing number of characters; some are tokenised ahead in a thread."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        chunks = _chunks(order, [len(texts[i]) for i in order])
        with ThreadPoolExecutor(1, thread_name_prefix="monoblock-tokenizer") as thread:
            waiting: deque[Future[list[Tokenized]]] = deque()
            for chunk in chunks:
                waiting.append(thread.submit(self._tokenize, texts, chunk))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _tokenize(self, texts: Sequence[str], chunk: list[int]) -> list[Tokenized]:
        rows, cut = self.transformer.rows([self.prompt + texts[i] for i in chunk])
        return [Tokenized(*item) for item in zip(chunk, rows, cut, strict=True)]

    # ------------------------------------------------------------------ tokens to vectors

    def _is_full(self, waiting: list[Tokenized]) -> bool:
        if self.packed:
            return sum(map(len, waiting)) > self.budget
        return len(waiting) >= self.batch_size

    def _next(self, waiting: list[Tokenized]) -> Iterator[Encoded]:
        """Remove the next batch from the front of the list, and run it."""
        if not len(waiting[-1]):  # by decreasing length: all texts without tokens are at the end
            first = next(i for i, text in enumerate(waiting) if not len(text))
            batch = waiting[first:]
            del waiting[first:]
            yield self._without_tokens(batch)
            return
        if self.packed:
            count = _within(self.budget, [len(text) for text in waiting])
            states = self.transformer.adapter.packed([text.row["input_ids"] for text in waiting[:count]])
            if states is not None:
                batch = waiting[:count]
                del waiting[:count]
                yield from self._packed(batch, states)
                return
            self.packed = False
        batch = waiting[: self.batch_size]
        del waiting[: self.batch_size]
        yield self._padded(batch)

    def _packed(self, batch: list[Tokenized], states: Any) -> Iterator[Encoded]:
        """Texts of equal length form an array without padding."""
        start = first = 0
        while first < len(batch):
            length = len(batch[first])
            count = next(
                (i for i, text in enumerate(batch[first:]) if len(text) != length), len(batch) - first
            )
            rows = batch[first : first + count]
            end = start + count * length
            yield self._through({"token_embeddings": states[start:end].reshape(count, length, -1)}, rows)
            start, first = end, first + count

    def _padded(self, batch: list[Tokenized]) -> Encoded:
        inputs = self.transformer.padded([text.row for text in batch])
        features: dict[str, Any] = {"token_embeddings": self.transformer.adapter.padded(inputs)}
        if "attention_mask" in inputs:
            features["attention_mask"] = self._array(np.asarray(inputs["attention_mask"]))
        return self._through(features, batch)

    def _without_tokens(self, batch: list[Tokenized]) -> Encoded:
        """One masked token per text."""
        self.empty += len(batch)
        states = np.zeros((len(batch), 1, self.transformer.get_embedding_dimension()), np.float32)
        mask = np.zeros((len(batch), 1), np.int64)
        return self._through(
            {"token_embeddings": self._array(states), "attention_mask": self._array(mask)}, batch
        )

    def _array(self, values: np.ndarray) -> Any:
        adapter = self.transformer.adapter
        return values if adapter.on_host else adapter.tensor(values)

    def _through(self, features: dict[str, Any], batch: list[Tokenized]) -> Encoded:
        if self.prompt_length:
            features["prompt_length"] = self.prompt_length
        for module in self.modules:
            features = module(features)
        return Encoded([text.index for text in batch], {**features, "rows": [text.row for text in batch]})


def _chunks(order: list[int], sizes: list[int]) -> Iterator[list[int]]:
    chunk: list[int] = []
    total = 0
    for index, size in zip(order, sizes, strict=True):
        if chunk and (len(chunk) == TEXTS or total + size > CHARACTERS):
            yield chunk
            chunk, total = [], 0
        chunk.append(index)
        total += size
    if chunk:
        yield chunk


def _within(budget: int, lengths: Sequence[int]) -> int:
    """How many of the first texts fit the budget; at least one."""
    total = 0
    for count, length in enumerate(lengths):
        total += length
        if count and total > budget:
            return count
    return len(lengths)


def rows_of(rows: Rows, name: str) -> list[list[int]]:
    """One input of all rows."""
    return [row[name] for row in rows]
