"""Matrices as MLX quantises them, made by hand with NumPy from its documented layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def quantised(
    outputs: int, inputs: int, *, bits: int, group: int, dtype: torch.dtype = torch.float16, seed: int = 0
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """A matrix's tensors by their endings, and its weights in float32. Some scales are negative, as MLX's are."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (outputs, inputs))
    scale = random.uniform(0.5, 1, (outputs, inputs // group)) * 0.4 / (1 << bits)
    scale *= random.choice((-1, 1), scale.shape)
    bias = -scale * (1 << bits - 1) + random.uniform(-0.01, 0.01, scale.shape)
    scales, biases = (torch.from_numpy(x).to(dtype) for x in (scale, bias))
    words = np.zeros((outputs, inputs * bits // 32), np.uint32)
    for column in range(inputs):  # bit by bit
        for bit in range(bits):
            place = column * bits + bit
            words[:, place // 32] |= ((codes[:, column] >> bit & 1) << place % 32).astype(np.uint32)
    wide = (np.repeat(x.float().numpy(), group, axis=1) for x in (scales, biases))
    a, b = wide
    weight = codes.astype(np.float32) * a + b
    tensors = {"weight": torch.from_numpy(words.view(np.int32)).view(torch.uint32)}
    return {**tensors, "scales": scales, "biases": biases}, weight


def declared(bits: int, group: int, **modules: Any) -> dict[str, Any]:
    """The fields of config.json."""
    how = {"group_size": group, "bits": bits, **modules}
    return {"quantization": how, "quantization_config": how}
