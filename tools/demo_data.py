"""Batches of the demo's training: documents as token ids, shuffled in every epoch and cut into windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import demo_corpus as corpus
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

LIBRARY_REPEATS = 2  # library code is weighted twice: tests are as much text with less variety


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Contiguous token ids, and how often an epoch repeats them."""

    ids: np.ndarray
    repeats: int


def segments(documents: Sequence[corpus.Document], tokenizer: Tokenizer) -> list[Segment]:
    """Each file with an end token, and the dialogues of each file, without held-out files."""
    training = [document for document in documents if not document.held_out]
    texts = [document.text + corpus.ENDOFTEXT for document in training]
    repeats = [1 if document.is_test else LIBRARY_REPEATS for document in training]
    for document in training:
        talk = "".join(
            f"{corpus.USER}{request}{corpus.ASSISTANT}{reply}{corpus.ENDOFTEXT}"
            for request, reply in corpus.dialogues(document)
        )
        if talk:
            texts.append(talk)
            repeats.append(1)
    return [
        Segment(ids=np.asarray(encoding.ids, dtype=np.uint16), repeats=count)
        for encoding, count in zip(tokenizer.encode_batch(texts), repeats, strict=True)
    ]


def line_breaks(tokenizer: Tokenizer) -> np.ndarray:
    """The line break of each id (vocab,): 0 none, 1 a new line with indentation, 2 a new line at column 0."""
    kinds = np.zeros(tokenizer.get_vocab_size(), dtype=np.int8)
    for token, number in tokenizer.get_vocab().items():
        if token.startswith("Ċ"):  # a line feed in byte-level BPE; Ġ is a space
            kinds[number] = 1 if token.endswith("Ġ") else 2
        elif token in (corpus.ENDOFTEXT, corpus.ASSISTANT):
            kinds[number] = 2
    return kinds


def line_starts(stream: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """For each position of the stream, the next position at which a window may begin.

    Windows begin at a line break with indentation, or at the first word of a line at column 0. Thus a window that
    begins with a word begins at column 0, like a prompt; otherwise its first `def` could be that of a method.
    """
    breaks = kinds[stream]
    allowed = breaks == 1
    allowed[1:] |= breaks[:-1] == 2
    positions = np.where(allowed, np.arange(len(stream)), len(stream))
    return np.minimum.accumulate(positions[::-1])[::-1]


def batches(
    segments: Sequence[Segment], kinds: np.ndarray, *, seed: int, length: int, batch: int
) -> Iterator[Tensor]:
    """Infinite (batch, length) int64 windows. Epoch e is shuffled and offset by a generator seeded [seed, e]."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(
            np.repeat(np.arange(len(segments)), [segment.repeats for segment in segments])
        )
        stream = np.concatenate([segments[index].ids for index in order])
        starts = line_starts(stream, kinds)[rng.integers(length) :: length]
        starts = rng.permutation(starts[starts + length <= len(stream)])
        for first in range(0, len(starts) - batch + 1, batch):
            windows = stream[starts[first : first + batch, None] + np.arange(length)]
            yield torch.from_numpy(windows.astype(np.int64))
        epoch += 1


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Windows (n, length) of the held-out files, and the mean number of bytes per token."""

    windows: Tensor
    bytes_per_token: float


def held_out(documents: Sequence[corpus.Document], tokenizer: Tokenizer, length: int) -> HeldOut:
    """The held-out files, each followed by an end token, in windows without overlap."""
    texts = [document.text for document in documents if document.held_out]
    ids = [token for text in texts for token in tokenizer.encode(text + corpus.ENDOFTEXT).ids]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return HeldOut(windows=windows, bytes_per_token=sum(len(text.encode()) for text in texts) / len(ids))
