"""Rows in which several documents are packed, for JAX and TensorFlow; see tests/torch/test_documents.py for PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import expected

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
NUMBERS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None]
PLACES = np.concatenate([np.arange(length) for length in LENGTHS])[None]
ENDS = np.cumsum(LENGTHS)


def ids_of(rows: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(4).integers(10, 89, (rows, COUNT))


def positions(spec: Any) -> np.ndarray[Any, Any]:
    """Positions that begin anew, as this model's table numbers them."""
    learned = spec.position(Learned)
    return PLACES + (learned.offset if learned else 0)


def documents(x: Any) -> list[Any]:
    """The documents of rows, each as a batch of its own."""
    return np.split(x, ENDS[:-1], axis=1)


def definition(theirs: Any, ids: np.ndarray[Any, Any], **given: Any) -> np.ndarray[Any, Any]:
    """The oracle's last hidden states of packed rows, with the PyTorch model's weights."""
    return expected(theirs, ids, segments=np.broadcast_to(NUMBERS, ids.shape), **given).hidden
