"""Quantised weights through bitsandbytes: the linear layers of the blocks are replaced one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from monoblock.backends.pytorch.loading import DTYPES
from monoblock.quantization import BitsAndBytesConfig


def quantize(model: Any, how: BitsAndBytesConfig) -> None:
    """Replace the linear layers of the model's blocks. ImportError if bitsandbytes is not there."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError('quantised weights need bitsandbytes: pip install "monoblock[quant]"') from error
    blocks = model.backbone.blocks
    linears = {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    skipped = set(how.llm_int8_skip_modules or ())
    names = {known for name, _ in model.named_modules() for known in (name, name.rpartition(".")[2])}
    # What lies outside the blocks, the head by the hub's name among it, is never packed.
    if unknown := sorted(skipped - names - set(model.family.projections.values())):
        raise ValueError(f"llm_int8_skip_modules names {unknown[0]!r}, which is no module of this model")
    for name, module in linears.items():
        owner, _, last = name.rpartition(".")
        if not skipped & {f"backbone.blocks.{name}", last}:
            setattr(blocks.get_submodule(owner), last, _layer(bitsandbytes.nn, module, how))
    model.quantization_config = how


def _layer(bnb: Any, linear: nn.Linear, how: BitsAndBytesConfig) -> nn.Module:
    """The layer with its weights packed; bitsandbytes packs when weights are moved to their device."""
    weight, shape = linear.weight.detach(), (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    if how.load_in_4bit:
        kind = {"quant_type": how.bnb_4bit_quant_type, "compress_statistics": how.bnb_4bit_use_double_quant}
        made = bnb.Linear4bit(
            *shape, bias=bias, compute_dtype=_dtype(how.bnb_4bit_compute_dtype, weight), **kind
        )
        made.weight = bnb.Params4bit(weight.clone(), requires_grad=False, **kind)
    else:
        made = bnb.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=how.llm_int8_threshold)
        made.weight = bnb.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to(weight.device).train(linear.training)


def _dtype(asked: Any, weight: torch.Tensor) -> torch.dtype:
    if asked is None or isinstance(asked, torch.dtype):
        return asked or weight.dtype
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"bnb_4bit_compute_dtype must be a torch dtype or its name, got {asked!r}")
    return DTYPES[name]


def wanted(config: Any, in_4bit: bool, in_8bit: bool) -> BitsAndBytesConfig | None:
    """The quantisation that from_pretrained's arguments ask for, if any."""
    if config is not None and (in_4bit or in_8bit):
        raise ValueError("give quantization_config, or load_in_4bit or load_in_8bit, not both")
    if config is None:
        return BitsAndBytesConfig(load_in_4bit=in_4bit, load_in_8bit=in_8bit) if in_4bit or in_8bit else None
    if isinstance(config, dict):
        return BitsAndBytesConfig(**config)
    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(f"quantization_config must be a BitsAndBytesConfig, got {config!r}")
    return config
