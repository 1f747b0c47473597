"""Matrices as GPTQ, AWQ and compressed-tensors write them, made by hand with NumPy from their published layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word, from its lowest bits on


def words(fields: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Fields (n, m) as 32-bit words (n, m * bits / 32), field by field."""
    each = 32 // bits
    made = np.zeros((fields.shape[0], fields.shape[1] // each), np.uint64)
    for column in range(made.shape[1]):
        for i in range(each):
            field = fields[:, column * each + (order[i] if order else i)].astype(np.uint64)
            made[:, column] |= field << np.uint64(bits * i)
    return made.astype(np.uint32).view(np.int32)


class Packed:
    """One random matrix: its tensors by their endings, and its weights in float32."""

    def __init__(
        self,
        tool: str,
        outputs: int,
        inputs: int,
        *,
        bits: int = 4,
        group: int = 128,
        symmetric: bool = False,
        version: int = 1,
        act_order: bool = False,
        scales: Any = torch.float16,
        seed: int = 0,
    ):
        random = np.random.default_rng(seed)
        size = inputs if group == -1 else group
        groups = -(-inputs // size)
        codes = random.integers(0, 1 << bits, (outputs, inputs), dtype=np.uint8)
        middle = 1 << bits - 1
        zeros = np.full((groups, outputs), middle, np.int64)
        if not symmetric:
            zeros = random.integers(1, 1 << bits, (groups, outputs))
        scale = torch.from_numpy(random.uniform(0.5, 1, (groups, outputs)) * 0.4 / (1 << bits)).to(scales)
        index = np.arange(inputs) // size
        if act_order:
            random.shuffle(index)
        wide = scale.float().numpy()
        self.weight = (codes.astype(np.float32) - zeros.T[:, index]) * wide.T[:, index]
        self.weight = self.weight.astype(np.float32)
        if tool == "awq":
            code_words, zero_words = words(codes.T, 4, AWQ_ORDER), words(zeros, 4, AWQ_ORDER)
        else:
            code_words = np.ascontiguousarray(words(codes, bits).T)
            zero_words = words(zeros - (1 if version == 1 else 0), bits)
        self.tensors = {"qweight": torch.from_numpy(code_words), "qzeros": torch.from_numpy(zero_words)}
        self.tensors["scales"] = scale
        if tool == "gptq":
            self.tensors["g_idx"] = torch.from_numpy(index.astype(np.int32))


def padded_words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields (n, m) as 32-bit words, the first in the lowest bits; the last word is padded."""
    each = 32 // bits
    padded = np.pad(fields, ((0, 0), (0, -fields.shape[1] % each))).astype(np.uint64)
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(bits)
    return (padded.reshape(len(fields), -1, each) << shifts).sum(-1).astype(np.uint32).view(np.int32)


def compressed(
    outputs: int, inputs: int, layout: str, bits: int, strategy: str, size: int, symmetric: bool, seed: int
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """A matrix's tensors by their endings, and its weights in float32."""
    random = np.random.default_rng(seed)
    middle = 1 << bits - 1
    codes = random.integers(-middle, middle, (outputs, inputs))
    groups = {"group": inputs // size, "channel": 1, "tensor": 1}[strategy]
    rows = 1 if strategy == "tensor" else outputs
    scale = torch.from_numpy(random.uniform(0.5, 1, (rows, groups)) * 0.4 / (1 << bits)).bfloat16()
    zeros = (
        np.zeros((outputs, groups), np.int64)
        if symmetric
        else random.integers(-middle, middle, (outputs, groups))
    )
    index = np.arange(inputs) // (size if strategy == "group" else inputs)
    wide = np.broadcast_to(scale.float().numpy(), (outputs, groups))
    weight = ((codes - zeros[:, index]).astype(np.float32) * wide[:, index]).astype(np.float32)
    tensors = {"weight_scale": scale.flatten() if strategy == "tensor" else scale}
    if layout == "int-quantized":
        tensors["weight"] = torch.from_numpy(codes.astype(np.int8))
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
        return tensors, weight
    tensors["weight_packed"] = torch.from_numpy(padded_words(codes + middle, bits))
    tensors["weight_shape"] = torch.tensor([outputs, inputs])
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(
            np.ascontiguousarray(padded_words((zeros + middle).T, bits).T)
        )
    return tensors, weight
