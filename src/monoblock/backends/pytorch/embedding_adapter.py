"""The interface of sentence embeddings to PyTorch: hidden states of texts, and the operations of pooling."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.packed_forward import obstacle, packed_states
from monoblock.backends.pytorch.pipeline_adapter import Adapter, found_device


class TensorOps:
    """`EmbeddingOps` on tensors, with gradients."""

    def mask(self, x_bs: Tensor) -> Tensor:
        return x_bs != 0

    def ones(self, x_bsw: Tensor) -> Tensor:
        return torch.ones(x_bsw.shape[:2], dtype=torch.bool, device=x_bsw.device)

    def filled(self, x_bsw: Tensor, mask_bs: Tensor, value: float) -> Tensor:
        return x_bsw.masked_fill(~mask_bs[..., None], value)

    def sum_tokens(self, x_bsw: Tensor) -> Tensor:
        return x_bsw.sum(1)

    def max_tokens(self, x_bsw: Tensor) -> Tensor:
        return x_bsw.amax(1)

    def token(self, x_bsw: Tensor, index_b: Tensor) -> Tensor:
        return x_bsw[torch.arange(len(x_bsw), device=x_bsw.device), index_b]

    def numbers(self, mask_bs: Tensor, like: Tensor) -> Tensor:
        return mask_bs.cumsum(1).to(like.dtype)

    def first(self, mask_bs: Tensor) -> Tensor:
        return mask_bs.int().argmax(1)

    def last(self, mask_bs: Tensor) -> Tensor:
        index = mask_bs.shape[1] - 1 - mask_bs.flip(1).int().argmax(1)
        return torch.where(mask_bs.any(1), index, 0)

    def after(self, mask_bs: Tensor, count: int) -> Tensor:
        return mask_bs & (mask_bs.cumsum(1) > count)

    def at_least(self, x: Tensor, least: float) -> Tensor:
        return x.clamp(min=least)

    def sqrt(self, x: Tensor) -> Tensor:
        return x.sqrt()

    def concatenated(self, arrays: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(arrays), -1)

    def linear(self, x: Tensor, weight_ow: Any, bias_o: Any) -> Tensor:
        return nn.functional.linear(x, _like(weight_ow, x), None if bias_o is None else _like(bias_o, x))

    def activation(self, name: str, x: Tensor) -> Tensor:
        return getattr(nn, name)()(x)

    def layer_norm(self, x: Tensor, weight_w: Any, bias_w: Any, eps: float) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], _like(weight_w, x), _like(bias_w, x), eps)

    def normalized(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)

    def array(self, values: Any) -> Tensor:
        if isinstance(values, list | tuple) and any(hasattr(value, "shape") for value in values):
            return torch.stack([self.array(value) for value in values])
        return torch.as_tensor(values)

    def product(self, x_aw: Tensor, x_bw: Tensor) -> Tensor:
        return x_aw @ x_bw.T

    def distances(self, x_aw: Tensor, x_bw: Tensor, order: int) -> Tensor:
        return torch.cdist(x_aw, x_bw, p=float(order))

    def sum_last(self, x: Tensor) -> Tensor:
        return x.sum(-1)

    def top(self, scores_ab: Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
        values, index = scores_ab.topk(min(count, scores_ab.shape[1]), sorted=False)
        return values.tolist(), index.tolist()


OPS = TensorOps()


def _like(value: Any, x: Tensor) -> Tensor:
    """A parameter, a tensor or a NumPy array on the device and in the dtype of `x`."""
    return torch.as_tensor(value).to(x.device, x.dtype)


log = logging.getLogger("monoblock")


class EmbeddingAdapter(Adapter):
    """Runs a PyTorch model on lists of ids, with or without gradients."""

    ops = OPS
    tensors = "pt"  # return_tensors of the tokenizer

    def __init__(self, model: Any) -> None:
        super().__init__(model, None if hasattr(model, "hf_device_map") else model.device)
        self._told: str | None = None  # the reason against the native library that was logged last

    @property
    def on_host(self) -> bool:
        """Whether results are pooled with NumPy."""
        return self.device.type == "cpu"

    def to(self, device: Any) -> None:
        """Move the model; None: to the accelerator if there is one."""
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(found_device(device))
        elif device is not None:
            raise ValueError(f"device={device!r}: the model is placed by its device_map already")

    def cast(self, dtype: Any) -> None:
        """Convert the model to a dtype, or its name."""
        self.model.to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def packed(self, ids: Sequence[Sequence[int]]) -> Any:
        """The hidden states [total tokens, width] of texts without padding; None if only `padded` can run them."""
        with torch.inference_mode():
            states = packed_states(self.model, ids)
        if states is None and self._told != (why := obstacle(self.model)):
            log.info("texts are run by the model's modules, padded to one length per batch: %s", why)
            self._told = why
        return states if states is None or not self.on_host else self.numpy(states)

    def padded(self, inputs: Mapping[str, Any]) -> Any:
        """The hidden states [texts, tokens, width] of rows of equal length."""
        states = self.run(inputs)[0]
        return self.numpy(states) if self.on_host else states

    def logits(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """The first output [texts, labels] of a model with a head, as NumPy float32."""
        return self.numpy(self.run(inputs)[0])

    def outputs(self, features: Mapping[str, Any]) -> Any:
        """The model's output for tensors, with gradients if they are enabled."""
        inputs = {name: value.to(self.device) for name, value in features.items() if name in self.accepts}
        options = {"use_cache": False} if "use_cache" in self.accepts else {}
        return self.model(**inputs, **options)

    @staticmethod
    def without_gradients() -> Any:
        """A context in which operations on tensors are not recorded."""
        return torch.inference_mode()

    def tensor(self, array: np.ndarray) -> Tensor:
        """A NumPy array as a tensor on the model's device, in the array's dtype."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def parameter(self, array: Any) -> nn.Parameter:
        """A trainable parameter on the model's device and in its dtype."""
        return nn.Parameter(torch.as_tensor(array).detach().to(self.device, self.dtype, copy=True))

    def place(self, parameter: nn.Parameter) -> None:
        """Move a parameter to the model's device and dtype, in place."""
        parameter.data = parameter.data.to(self.device, self.dtype)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The model's parameters by name."""
        return self.model.named_parameters()

    def train(self, mode: bool) -> None:
        """Enable or disable dropout."""
        self.model.train(mode)

    def joined(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows as one tensor."""
        return torch.stack(list(rows))

    @staticmethod
    def devices() -> list[str]:
        """The devices of a new pool of processes: all accelerators, else the CPU four times."""
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None:
            return ["cpu"] * 4
        return [f"{found.type}:{index}" for index in range(torch.accelerator.device_count())]

    @staticmethod
    def limit_threads(count: int) -> None:
        """The number of threads of this process."""
        torch.set_num_threads(count)
