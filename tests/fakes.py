"""A model without weights: the next token's scores come from a function, so that expected outputs are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from monoblock.generation import loop
from monoblock.generation.arrays import NumpyOps

LOW = -20.0


class TableDecoder:
    """Scores of the next token from a row's ids so far, which it caches."""

    past_key_values = None

    def __init__(self, scores: Callable[[list[int]], np.ndarray], plan: Any, log: list[Any]):
        self.scores, self.plan, self.log = scores, plan, log
        self.rows: list[list[int]] = []
        self.attentions = self.hidden_states = None

    def prefill(self, ids_bn: np.ndarray, mask_bm: np.ndarray | None) -> np.ndarray:
        self.log.append(("prefill", ids_bn.tolist(), None if mask_bm is None else mask_bm.tolist()))
        mask = np.ones_like(ids_bn) if mask_bm is None else mask_bm
        self.rows = [
            [int(t) for t, m in zip(i, k, strict=True) if m] for i, k in zip(ids_bn, mask, strict=True)
        ]
        return self._scores()

    def step(self, ids_b1: np.ndarray) -> np.ndarray:
        assert ids_b1.shape == (len(self.rows), 1)
        self.log.append(("step", ids_b1[:, 0].tolist()))
        for row, token in zip(self.rows, ids_b1[:, 0], strict=True):
            row.append(int(token))
        return self._scores()

    def extend(self, ids_bk: np.ndarray) -> np.ndarray:
        return np.stack([self.step(ids_bk[:, [k]]) for k in range(ids_bk.shape[1])], axis=1)

    def crop(self, length: int) -> None:
        """Left-padded rows cannot be cropped: their padding is not stored."""
        self.rows = [row[:length] for row in self.rows]

    def reorder(self, index_b: np.ndarray) -> None:
        self.log.append(("reorder", index_b.tolist()))
        self.rows = [list(self.rows[i]) for i in index_b]

    def _scores(self) -> np.ndarray:
        self.hidden_states = (np.array([[len(row)] for row in self.rows]),)
        return np.stack([self.scores(row) for row in self.rows]).astype(np.float32)


class TableModel:
    """`loop.GenerativeModel` over a `TableDecoder`; `log` records the decoder's calls."""

    ops = NumpyOps()
    unsupported: ClassVar[dict[str, Any]] = {}
    compiled = None
    input_names = frozenset({"past_key_values", "inputs_embeds"})

    def __init__(self, scores: Callable[[list[int]], np.ndarray], generation_config: Any = None):
        self.scores, self.generation_config = scores, generation_config
        self.max_positions: int | None = None
        self.vocab: int | None = None
        self.log: list[Any] = []
        self.plan: Any = None

    def decoder(self, plan: Any, inputs: dict[str, Any]) -> TableDecoder:
        self.plan, self.inputs = plan, inputs
        return TableDecoder(self.scores, plan, self.log)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return loop.generate(self, *args, **kwargs)


def one_hot(token: int, vocab: int) -> np.ndarray:
    scores = np.full(vocab, LOW)
    scores[token] = 0.0
    return scores


def counting(vocab: int = 100) -> TableModel:
    """The next token is always the last one plus 1."""
    return TableModel(lambda ids: one_hot((ids[-1] + 1) % vocab, vocab))


def constant(scores: Any) -> TableModel:
    """The same scores at every step."""
    return TableModel(lambda ids: np.asarray(scores))
