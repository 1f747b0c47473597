"""Texts to batches to vectors: tokenisation in a background thread, batches of similar length, and pooling."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.embeddings.transformer import Transformer

log = logging.getLogger("monoblock")

Input = str | tuple[str, str]  # a text, or a pair of texts

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

    def stream(self, texts: Sequence[Input]) -> Iterator[Encoded]:
        """The texts' features in batches, the longest texts first; `cut` and `empty` are known at the end."""
        for batch in self._batches(texts):
            yield from self._states(batch)

    def logits(self, texts: Sequence[Input]) -> Iterator[tuple[int, np.ndarray]]:
        """The index of each text, and the first output of a model with a head, [labels]."""
        self.packed = False
        for batch in self._batches(texts):
            if not all(map(len, batch)):
                raise ValueError("a pair has no tokens: both of its texts are empty")
            inputs = self.transformer.padded([text.row for text in batch])
            yield from zip(
                [text.index for text in batch], self.transformer.adapter.logits(inputs), strict=True
            )

    def _batches(self, texts: Sequence[Input]) -> Iterator[list[Tokenized]]:
        """Batches of texts by decreasing number of tokens, as far as chunks of texts are tokenised together."""
        waiting: list[Tokenized] = []
        for chunk in self._tokenized(texts):
            for text in chunk:
                if text.cut:
                    self.cut[text.index] = text.cut
            waiting = sorted([*waiting, *chunk], key=len, reverse=True)
            while self._is_full(waiting):
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def report(self, count: int, call: str = "encode") -> None:
        """Log a warning of the texts that were cut, and of those without tokens."""
        if self.cut:
            log.warning(
                "%d of %d texts have more than max_seq_length=%s tokens: %d tokens were cut; "
                "%s(..., return_truncated=True) gives their number for each text",
                len(self.cut),
                count,
                self.transformer.max_seq_length,
                sum(self.cut.values()),
                call,
            )
        if self.empty:
            log.warning("%d of %d texts have no tokens: their token states are 0", self.empty, count)

    # ------------------------------------------------------------------ texts to tokens

    def _tokenized(self, texts: Sequence[Input]) -> Iterator[list[Tokenized]]:
        """The texts in chunks, by decreasing number of characters; some are tokenised ahead in a thread."""
        sizes = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts]
        order = sorted(range(len(texts)), key=sizes.__getitem__, reverse=True)
        chunks = _chunks(order, [sizes[i] for i in order])
        with ThreadPoolExecutor(1, thread_name_prefix="monoblock-tokenizer") as thread:
            waiting: deque[Future[list[Tokenized]]] = deque()
            for chunk in chunks:
                waiting.append(thread.submit(self._tokenize, texts, chunk))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _tokenize(self, texts: Sequence[Input], chunk: list[int]) -> list[Tokenized]:
        rows, cut = self.transformer.rows([_prompted(texts[i], self.prompt) for i in chunk])
        return [Tokenized(*item) for item in zip(chunk, rows, cut, strict=True)]

    # ------------------------------------------------------------------ tokens to vectors

    def _is_full(self, waiting: list[Tokenized]) -> bool:
        if self.packed:
            return sum(map(len, waiting)) > self.budget
        return len(waiting) >= self.batch_size

    def _next(self, waiting: list[Tokenized]) -> list[Tokenized]:
        """Remove the next batch from the front of the list."""
        count = _within(self.budget, [len(text) for text in waiting]) if self.packed else self.batch_size
        batch = waiting[:count]
        del waiting[:count]
        return batch

    def _states(self, batch: list[Tokenized]) -> Iterator[Encoded]:
        """The features of a batch; texts without tokens, which are at its end, do not run through the model."""
        full = [text for text in batch if len(text)]
        if len(full) < len(batch):
            yield self._without_tokens(batch[len(full) :])
        if full and self.packed:
            states = self.transformer.adapter.packed([text.row["input_ids"] for text in full])
            if states is not None:
                yield from self._packed(full, states)
                return
            self.packed = False
        for start in range(0, len(full), self.batch_size):
            yield self._padded(full[start : start + self.batch_size])

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
        with self.transformer.adapter.without_gradients():
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


def _prompted(text: Input, prompt: str) -> Input:
    """The text, or the first text of the pair, after a prompt."""
    return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])
