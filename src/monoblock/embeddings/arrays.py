"""`EmbeddingOps`: the array operations of pooling and of the modules after it, with their NumPy implementation.

Shape suffixes: `b` texts, `s` tokens, `w` width, `o` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Array = Any  # a NumPy array, or an array of the backend's framework

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "Sigmoid", "GELU", "SiLU")  # names of classes in torch.nn


class EmbeddingOps(Protocol):
    """The operations that a framework implements; none modifies its arguments."""

    def mask(self, x_bs: Array) -> Array:
        """Whether each value is not 0."""
        ...

    def ones(self, x_bsw: Array) -> Array:
        """A mask [b, s] without masked tokens."""
        ...

    def filled(self, x_bsw: Array, mask_bs: Array, value: float) -> Array:
        """The array with `value` at masked tokens."""
        ...

    def sum_tokens(self, x_bsw: Array) -> Array:
        """The sum over the tokens, [b, w]."""
        ...

    def max_tokens(self, x_bsw: Array) -> Array:
        """The maximum over the tokens, [b, w]."""
        ...

    def token(self, x_bsw: Array, index_b: Array) -> Array:
        """One token of each text, [b, w]."""
        ...

    def numbers(self, mask_bs: Array, like: Array) -> Array:
        """1, 2, 3, ... for the tokens that are not masked, in the dtype of `like`."""
        ...

    def first(self, mask_bs: Array) -> Array:
        """The index of the first token that is not masked, [b]; 0 if all are."""
        ...

    def last(self, mask_bs: Array) -> Array:
        """The index of the last token that is not masked, [b]; 0 if all are."""
        ...

    def after(self, mask_bs: Array, count: int) -> Array:
        """The mask without the first `count` of its tokens in each row."""
        ...

    def at_least(self, x: Array, least: float) -> Array:
        """Elementwise maximum with a number."""
        ...

    def sqrt(self, x: Array) -> Array:
        """Elementwise square root."""
        ...

    def concatenated(self, arrays: Sequence[Array]) -> Array:
        """The arrays one after another along the last axis."""
        ...

    def linear(self, x: Array, weight_ow: Array, bias_o: Array | None) -> Array:
        """x @ weight.T + bias."""
        ...

    def activation(self, name: str, x: Array) -> Array:
        """One of `ACTIVATIONS`."""
        ...

    def layer_norm(self, x: Array, weight_w: Array, bias_w: Array, eps: float) -> Array:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
        ...

    def normalized(self, x: Array) -> Array:
        """Each row divided by its length, or by 1e-12 if that is larger."""
        ...

    def array(self, values: Any) -> Array:
        """An array of the framework, from lists, NumPy arrays or arrays of the framework."""
        ...

    def product(self, x_aw: Array, x_bw: Array) -> Array:
        """The dot products of all pairs, [a, b]."""
        ...

    def distances(self, x_aw: Array, x_bw: Array, order: int) -> Array:
        """The distances of all pairs, [a, b]: order 1 (Manhattan) or 2 (Euclidean)."""
        ...

    def sum_last(self, x: Array) -> Array:
        """The sum over the last axis."""
        ...

    def top(self, scores_ab: Array, count: int) -> tuple[list[list[float]], list[list[int]]]:
        """The largest scores of each row and their indices, in any order."""
        ...


class HostOps:
    """NumPy, float32.

    A row of a result has the same bits whatever the other rows are and however many masked tokens follow: sums over
    tokens add them in order, starting from 0, and a matrix product takes one row at a time.
    """

    def mask(self, x_bs: np.ndarray) -> np.ndarray:
        return np.asarray(x_bs) != 0

    def ones(self, x_bsw: np.ndarray) -> np.ndarray:
        return np.ones(x_bsw.shape[:2], bool)

    def filled(self, x_bsw: np.ndarray, mask_bs: np.ndarray, value: float) -> np.ndarray:
        return x_bsw if mask_bs.all() else np.where(mask_bs[..., None], x_bsw, np.float32(value))

    def sum_tokens(self, x_bsw: np.ndarray) -> np.ndarray:
        if x_bsw.shape[2] == 1:  # NumPy would add a contiguous axis pairwise
            return np.add.accumulate(x_bsw, axis=1)[:, -1] + np.float32(0)
        return np.add.reduce(np.ascontiguousarray(x_bsw), axis=1, initial=np.float32(0))

    def max_tokens(self, x_bsw: np.ndarray) -> np.ndarray:
        return np.max(x_bsw, axis=1)

    def token(self, x_bsw: np.ndarray, index_b: np.ndarray) -> np.ndarray:
        return x_bsw[np.arange(len(x_bsw)), index_b]

    def numbers(self, mask_bs: np.ndarray, like: np.ndarray) -> np.ndarray:
        return np.cumsum(mask_bs, axis=1, dtype=like.dtype)

    def first(self, mask_bs: np.ndarray) -> np.ndarray:
        return np.argmax(mask_bs, axis=1)

    def last(self, mask_bs: np.ndarray) -> np.ndarray:
        index = mask_bs.shape[1] - 1 - np.argmax(mask_bs[:, ::-1], axis=1)
        return np.where(mask_bs.any(axis=1), index, 0)

    def after(self, mask_bs: np.ndarray, count: int) -> np.ndarray:
        return mask_bs & (np.cumsum(mask_bs, axis=1) > count)

    def at_least(self, x: np.ndarray, least: float) -> np.ndarray:
        return np.maximum(x, x.dtype.type(least))

    def sqrt(self, x: np.ndarray) -> np.ndarray:
        return np.sqrt(x)

    def concatenated(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays, axis=-1)

    def linear(self, x: np.ndarray, weight_ow: Array, bias_o: Array | None) -> np.ndarray:
        product = np.matmul(x[..., None, :], host(weight_ow).T)[..., 0, :]
        return product if bias_o is None else product + host(bias_o)

    def activation(self, name: str, x: np.ndarray) -> np.ndarray:
        match name:
            case "Identity":
                return x
            case "Tanh":
                return np.tanh(x)
            case "ReLU":
                return np.maximum(x, np.float32(0))
            case "Sigmoid":
                return _sigmoid(x)
            case "GELU":
                return (x * (1 + _erf(x / math.sqrt(2))) / 2).astype(x.dtype)
            case _:  # SiLU
                return x * _sigmoid(x)

    def layer_norm(self, x: np.ndarray, weight_w: Array, bias_w: Array, eps: float) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(centred * centred, axis=-1, keepdims=True)
        return centred / np.sqrt(variance + np.float32(eps)) * host(weight_w) + host(bias_w)

    def normalized(self, x: np.ndarray) -> np.ndarray:
        length = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
        return x / np.maximum(length, x.dtype.type(1e-12))

    def array(self, values: Any) -> np.ndarray:
        if isinstance(values, list | tuple) and any(hasattr(value, "shape") for value in values):
            return np.stack([self.array(value) for value in values])
        return host(values) if hasattr(values, "detach") else np.asarray(values)

    def product(self, x_aw: np.ndarray, x_bw: np.ndarray) -> np.ndarray:
        return x_aw @ x_bw.T

    def distances(self, x_aw: np.ndarray, x_bw: np.ndarray, order: int) -> np.ndarray:
        if not len(x_aw):
            return np.zeros((0, len(x_bw)), x_bw.dtype)
        return np.stack([self._distance(row - x_bw, order) for row in x_aw])

    def _distance(self, difference: np.ndarray, order: int) -> np.ndarray:
        if order == 1:
            return np.abs(difference).sum(axis=-1)
        return np.sqrt((difference * difference).sum(axis=-1))

    def sum_last(self, x: np.ndarray) -> np.ndarray:
        return x.sum(axis=-1)

    def top(self, scores_ab: np.ndarray, count: int) -> tuple[list[list[float]], list[list[int]]]:
        columns = scores_ab.shape[1]
        index = (
            np.argpartition(-scores_ab, min(count, columns) - 1, axis=1)[:, :count] if columns else scores_ab
        )
        index = index.astype(np.int64)
        return np.take_along_axis(scores_ab, index, axis=1).tolist(), index.tolist()


HOST = HostOps()


def host(value: Array) -> np.ndarray:
    """A NumPy array, or a PyTorch tensor on any device, as NumPy float32."""
    if not isinstance(value, np.ndarray) and hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (np.tanh(x / 2) + 1) / 2


_erf = np.vectorize(math.erf, otypes=[np.float64])
