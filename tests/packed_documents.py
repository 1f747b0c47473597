"""Rows with several packed documents, for JAX and TensorFlow; tests/torch/test_documents.py is for PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import PAD, expected

from monoblock.spec import Learned

NAMES = (
    "MptForCausalLM",
    "MistralForCausalLM",
    "FuyuForCausalLM",
    "OpenAIGPTLMHeadModel",
    "GPTNeoForCausalLM",
    "MPNetForMaskedLM",
)
LENGTHS = (12, 5, 20, 1)  # longer and shorter than the windows
COUNT = sum(LENGTHS)
SEGMENTS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None]
POSITIONS = np.concatenate([np.arange(length) for length in LENGTHS])[None]


def ids_of(rows: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(4).integers(10, 89, (rows, COUNT))


def positions(spec: Any) -> np.ndarray[Any, Any]:
    """`position_ids` that restart at each document, including the offset of learned positions."""
    learned = spec.position(Learned)
    return POSITIONS + (learned.offset if learned else 0)


def unpacked(ids: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The documents of rows (rows, COUNT) in separate right-padded rows, (rows x documents, longest).

    All have one shape, since JAX compiles a program for each length.
    """
    wide = np.full((len(ids), len(LENGTHS), max(LENGTHS)), PAD)
    wide[:, SEGMENTS[0], POSITIONS[0]] = ids
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(int)
    flat = (-1, max(LENGTHS))
    return {"input_ids": wide.reshape(flat), "attention_mask": np.tile(mask, (len(ids), 1))}


def unpacked_indices(rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Row and column in the result of `unpacked` of the tokens of packed rows, each (rows, COUNT)."""
    first = len(LENGTHS) * np.arange(rows)[:, None]
    return first + SEGMENTS, POSITIONS.repeat(rows, axis=0)


def expected_hidden(theirs: Any, ids: np.ndarray[Any, Any], **given: Any) -> np.ndarray[Any, Any]:
    """The oracle's last hidden states of packed rows, with the weights of a PyTorch model."""
    return expected(theirs, ids, segments=np.broadcast_to(SEGMENTS, ids.shape), **given).hidden
