"""Linear layers quantised by bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.loading import DTYPES, Uninitialised
from monoblock.backends.pytorch.quantization.modules import matrix
from monoblock.quantization import BitsAndBytesConfig

BLOCKS = (64, 32)  # weights that share a scale in 4 bits: bitsandbytes' default, and its smallest


def layer(linear: nn.Module, how: BitsAndBytesConfig) -> nn.Module:
    """The layer quantised by bitsandbytes, on its device. ImportError: bitsandbytes is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError('quantised weights need bitsandbytes: pip install "monoblock[quant]"') from error
    assert isinstance(linear, nn.Linear | Conv1D)
    bnb: Any = bitsandbytes.nn
    weight, shape = matrix(linear, linear.weight.detach()), (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    made: Any
    if how.load_in_4bit:
        kind = {"quant_type": how.bnb_4bit_quant_type, "compress_statistics": how.bnb_4bit_use_double_quant}
        compute = _dtype(how.bnb_4bit_compute_dtype, weight)
        with torch.device("meta"), Uninitialised():
            made = bnb.Linear4bit(*shape, bias=bias, compute_dtype=compute, **kind)
        size = _block_size(linear)
        made.weight = bnb.Params4bit(weight.clone(), requires_grad=False, blocksize=size, **kind)
    else:
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_informative)
        with torch.device("meta"), Uninitialised():
            made = bnb.Linear8bitLt(
                *shape, bias=bias, has_fp16_weights=False, threshold=how.llm_int8_threshold
            )
        made.weight = bnb.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to(weight.device).train(linear.training)  # `.to` quantises the weights


def _is_informative(record: logging.LogRecord) -> bool:
    """A log filter: drops the message of each 8-bit product that inputs are cast to float16."""
    return "inputs will be cast" not in record.getMessage()


def _block_size(linear: nn.Linear | Conv1D) -> int:
    """On a CPU, bitsandbytes 0.50 dequantises wrongly if the row length is not a multiple of the block size."""
    if linear.weight.device.type != "cpu":
        return BLOCKS[0]
    if (size := next((size for size in BLOCKS if linear.in_features % size == 0), None)) is None:
        raise ValueError(
            f"bitsandbytes cannot dequantise 4-bit rows of {linear.in_features} weights on a CPU (no multiple of "
            f'{BLOCKS[-1]}): take quantization_config="int4", or load_in_8bit=True'
        )
    return size


def _dtype(asked: Any, weight: torch.Tensor) -> torch.dtype:
    if asked is None or isinstance(asked, torch.dtype):
        return asked or weight.dtype
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"bnb_4bit_compute_dtype must be a torch dtype or its name, got {asked!r}")
    return DTYPES[name]
