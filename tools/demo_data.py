"""From text to batches: pieces of token ids, shuffled anew in every epoch and cut into windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import demo_corpus as corpus
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

LIBRARY_REPEATS = 2  # library code counts twice: tests are as much text again, and say less


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Token ids that stay together, and how often an epoch shows them."""

    ids: np.ndarray
    repeats: int


def pieces(documents: Sequence[corpus.Document], tokenizer: Tokenizer) -> list[Piece]:
    """Each file with its end mark, and each file's dialogues; of the files not held out."""
    shown = [document for document in documents if not document.held_out]
    texts = [document.text + corpus.ENDOFTEXT for document in shown]
    repeats = [1 if document.is_test else LIBRARY_REPEATS for document in shown]
    for document in shown:
        talk = "".join(
            f"{corpus.USER}{request}{corpus.ASSISTANT}{reply}{corpus.ENDOFTEXT}"
            for request, reply in corpus.dialogues(document)
        )
        if talk:
            texts.append(talk)
            repeats.append(1)
    return [
        Piece(ids=np.asarray(encoding.ids, dtype=np.uint16), repeats=count)
        for encoding, count in zip(tokenizer.encode_batch(texts), repeats, strict=True)
    ]


def line_breaks(tokenizer: Tokenizer) -> np.ndarray:
    """What each id (vocab,) does to a line: 0 nothing, 1 begins a new one indented, 2 begins one at column 0."""
    kinds = np.zeros(tokenizer.get_vocab_size(), dtype=np.int8)
    for token, number in tokenizer.get_vocab().items():
        if token.startswith("Ċ"):  # byte-level BPE's letter for a line feed; a space is Ġ
            kinds[number] = 1 if token.endswith("Ġ") else 2
        elif token in (corpus.ENDOFTEXT, corpus.ASSISTANT):
            kinds[number] = 2
    return kinds


def line_starts(stream: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """For each place of the stream, the next one where a window may begin.

    That is a line break with its indentation, or the first word of a line at column 0. So a window that begins
    with a word begins at column 0, as every prompt does; cut anywhere, a `def` in front could be a method's.
    """
    breaks = kinds[stream]
    allowed = breaks == 1
    allowed[1:] |= breaks[:-1] == 2
    places = np.where(allowed, np.arange(len(stream)), len(stream))
    return np.minimum.accumulate(places[::-1])[::-1]


def batches(
    pieces: Sequence[Piece], kinds: np.ndarray, *, seed: int, length: int, batch: int
) -> Iterator[Tensor]:
    """Endless (batch, length) int64 windows. Epoch e is shuffled and offset by a generator seeded [seed, e]."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(np.repeat(np.arange(len(pieces)), [piece.repeats for piece in pieces]))
        stream = np.concatenate([pieces[index].ids for index in order])
        starts = line_starts(stream, kinds)[rng.integers(length) :: length]
        starts = rng.permutation(starts[starts + length <= len(stream)])
        for first in range(0, len(starts) - batch + 1, batch):
            windows = stream[starts[first : first + batch, None] + np.arange(length)]
            yield torch.from_numpy(windows.astype(np.int64))
        epoch += 1


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Windows (n, length) of the held-out files, and how many bytes of text one token stands for."""

    windows: Tensor
    bytes_per_token: float


def held_out(documents: Sequence[corpus.Document], tokenizer: Tokenizer, length: int) -> HeldOut:
    """The held-out files, each followed by its end mark, cut into windows that do not overlap."""
    texts = [document.text for document in documents if document.held_out]
    ids = [token for text in texts for token in tokenizer.encode(text + corpus.ENDOFTEXT).ids]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return HeldOut(windows=windows, bytes_per_token=sum(len(text.encode()) for text in texts) / len(ids))
