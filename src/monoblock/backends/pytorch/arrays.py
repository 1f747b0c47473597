"""`monoblock.generation`'s array operations on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock.generation.arrays import NOTHING_TO_DRAW


class TorchOps:
    """`ArrayOps` for tensors on one device; each method is the protocol's, in as few kernels as it takes."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def array(self, values: Any) -> Tensor:
        made = torch.as_tensor(values)
        if made.is_floating_point():
            kind = torch.float32
        else:
            kind = torch.bool if made.dtype == torch.bool else torch.int64
        return made.to(device=self.device, dtype=kind)

    def to_numpy(self, x: Tensor) -> np.ndarray[Any, Any]:
        return x.detach().cpu().numpy()

    def to_list(self, x: Tensor) -> Any:
        return x.tolist()

    def host(self, x: Tensor) -> Tensor:
        return x.cpu()

    def to_framework(self, x: Tensor) -> Tensor:
        return x

    def argmax(self, x_bk: Tensor) -> Tensor:
        return x_bk.argmax(-1)

    def softmax(self, x_bk: Tensor) -> Tensor:
        return x_bk.softmax(-1)

    def log_softmax(self, x_bk: Tensor) -> Tensor:
        return x_bk.log_softmax(-1)

    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    def log(self, x: Tensor) -> Tensor:
        return x.log()

    def abs(self, x: Tensor) -> Tensor:
        return x.abs()

    def max(self, x_bk: Tensor) -> Tensor:
        return x_bk.amax(-1, keepdim=True)

    def sum(self, x_bk: Tensor) -> Tensor:
        return x_bk.sum(-1, keepdim=True)

    def cumsum(self, x_bk: Tensor) -> Tensor:
        return x_bk.cumsum(-1)

    def all(self, x: Tensor) -> Tensor:
        return x.all(-1)

    def sort(self, x_bk: Tensor) -> tuple[Tensor, Tensor]:
        values, index = torch.sort(x_bk)
        return values, index

    def top_k(self, x_bk: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, index = torch.topk(x_bk, k)
        return values, index

    def take_along(self, x_bv: Tensor, index_bk: Tensor) -> Tensor:
        return x_bv.gather(-1, index_bk)

    def put_along(self, x_bv: Tensor, index_bk: Tensor, values: Tensor | float) -> Tensor:
        if isinstance(values, Tensor):
            return x_bv.scatter(-1, index_bk, values)
        return x_bv.scatter(-1, index_bk, values)

    def add_along(self, x_bv: Tensor, index_bk: Tensor, values_bk: Tensor) -> Tensor:
        return x_bv.scatter_add(-1, index_bk, values_bk.to(x_bv.dtype))

    def fill_columns(self, x_bv: Tensor, index_k: Tensor, value: float) -> Tensor:
        return x_bv.index_fill(-1, index_k, value)

    def where(self, condition: Tensor, x: Tensor | float, y: Tensor | float) -> Tensor:
        return torch.where(condition, x, y)

    def choose(self, condition: Any, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
        return yes() if condition else no()

    def full_like(self, x: Tensor, value: float) -> Tensor:
        return torch.full_like(x, value)

    def mask(self, rows: int, columns: int) -> Tensor:
        return torch.zeros((rows, columns), dtype=torch.bool, device=self.device)

    def take_rows(self, x: Tensor, index_b: Tensor) -> Tensor:
        return x.index_select(0, index_b.to(x.device))

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def sample(self, scores_bv: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.draw(scores_bv, 1, generator).squeeze(1)

    def draw(self, scores_bk: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        # One multinomial call on float32 probabilities: the same draws as transformers' for the same torch seed.
        try:
            return torch.multinomial(scores_bk.softmax(-1), count, generator=generator)
        except RuntimeError as error:
            if "probability" not in str(error) and "multinomial" not in str(error):
                raise
            raise ValueError(NOTHING_TO_DRAW) from error
