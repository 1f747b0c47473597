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


def batches(pieces: Sequence[Piece], *, seed: int, length: int, batch: int) -> Iterator[Tensor]:
    """Endless (batch, length) int64 windows. Epoch e is shuffled and offset by a generator seeded [seed, e]."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(np.repeat(np.arange(len(pieces)), [piece.repeats for piece in pieces]))
        stream = np.concatenate([pieces[index].ids for index in order])[rng.integers(length) :]
        windows = stream[: len(stream) // length * length].reshape(-1, length)
        windows = windows[rng.permutation(len(windows))]
        for start in range(0, len(windows) - batch + 1, batch):
            yield torch.from_numpy(windows[start : start + batch].astype(np.int64))
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
