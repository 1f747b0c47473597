"""The optimisers of the demo's trainer: Muon for the matrices of the blocks, AdamW for the other parameters.

Muon (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/): the update of a matrix is its momentum with all
singular values near 1, approximated by five steps of an odd polynomial instead of an SVD.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (
    3.4445,
    -4.7750,
    2.0315,
)  # coefficients of that post: the largest slope at 0 that converges for 0 < s <= 1


def orthogonal(update: Tensor, steps: int = 5) -> Tensor:
    """The approximate nearest semi-orthogonal matrix (..., m, n): singular values between 0.7 and 1.2."""
    a, b, c = QUINTIC
    x = update.bfloat16()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum. A fused qkv (3d, d) is treated as three matrices.

    `lr` is the change of the singular values of a square matrix per step; `weight_decay` is decoupled.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        if closure is not None:
            raise TypeError("Muon.step takes no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: nn.Parameter, group: dict) -> None:
        assert param.grad is not None
        state = self.state[param]
        velocity = state.setdefault("velocity", torch.zeros_like(param))
        velocity.lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(velocity, group["momentum"])
        rows, columns = update.shape
        if rows == 3 * columns:
            update = update.view(3, columns, columns)
        update = orthogonal(update).reshape(rows, columns)
        scale = max(1.0, rows / columns) ** 0.5 if rows != 3 * columns else 1.0
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * scale)


def optimizers(
    model: nn.Module, embedding: nn.Parameter, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for every matrix but the embedding; AdamW for the embedding and, without weight decay, the norms."""
    params = list(dict.fromkeys(model.parameters()))
    matrices = [p for p in params if p.ndim == 2 and p is not embedding]
    vectors = [p for p in params if p.ndim < 2]
    groups = [{"params": [embedding], "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=muon_lr, weight_decay=0.1),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8),
    ]
