"""Tiny PyTorch models and inputs that reach every feature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch

import monoblock
from monoblock import MptConfig, modules
from monoblock.families import family
from monoblock.modules import ModuleSpec, module
from monoblock.spec import ArchSpec

torch.set_num_threads(1)

# Older versions of torch.export refuse modules with attributes such as our table rows, and older versions of
# torch.compile a step whose logits depend on a number read from a tensor; both run without them.
traced_by_213 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="PyTorch before 2.13 cannot trace this",
)

CLASSES = (
    "MptModel",
    "MptForCausalLM",
    "MptForSequenceClassification",
    "MptForTokenClassification",
    "MptForQuestionAnswering",
)
KIND = dict(zip(CLASSES, (None, "causal", "sequence", "token", "span"), strict=True))
PAD = 3
PADDINGS = ("none", "left", "right")

# Sizes that are no powers of two: 6 heads of 6 channels, a vocabulary of 89.
SIZES: dict[str, Any] = {"d_model": 36, "n_heads": 6, "n_layers": 2, "vocab_size": 89, "max_seq_len": 48}


def config(attn: dict[str, Any] | None = None, **fields: Any) -> MptConfig:
    """A tiny MPT config; `attn` is its attn_config."""
    return MptConfig(**{**SIZES, "pad_token_id": PAD, **fields, "attn_config": attn or {}})


def model(
    name: str = "MptForCausalLM", attn: dict[str, Any] | None = None, seed: int = 0, **fields: Any
) -> Any:
    """A tiny model of that class with random weights, norms and biases among them, in evaluation mode."""
    made = getattr(monoblock, name)(config(attn, **fields))
    return randomised(made, seed).eval()


@torch.no_grad()
def randomised(module: Any, seed: int = 0, std: float = 0.2) -> Any:
    """Every parameter from a normal distribution; the weights of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = parameter.dim() == 1 and name.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if scale else std * noise)
    return module


def batch(
    padding: str = "left",
    lengths: tuple[int, ...] = (23, 9, 17),
    vocab: int = 89,
    seed: int = 1,
    *,
    low: int = PAD + 1,
    pad: int = PAD,
) -> Any:
    """Ids and mask (batch, tokens) of sequences of unequal lengths; "none": equal lengths and no mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(low, vocab, (len(lengths), longest), generator=generator)
    if padding == "none":
        return ids, None
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[longest - length :] = 1 if padding == "left" else 0
        row[:length] = 1 if padding == "right" else row[:length]
    return ids.masked_fill(mask == 0, pad), mask


def parameters(module: Any) -> dict[str, np.ndarray]:
    """The canonical parameters as NumPy float64; tied ones appear once."""
    return {name: tensor.double().numpy() for name, tensor in canonical(module).items()}


def canonical(module: Any, gradients: bool = False) -> dict[str, torch.Tensor]:
    """The parameters of a PyTorch model, or the gradients that are not None, by canonical name in canonical shape."""
    found: dict[str, torch.Tensor] = {}
    shapes = module.shapes()
    for name, source in module.sources().items():
        own = [module.get_parameter(key) for key in source.names]
        tensors = [p.grad if gradients else p.detach() for p in own]
        if any(tensor is None for tensor in tensors):
            continue
        found[name] = torch.empty(shapes[name], dtype=own[0].dtype)
        for view, tensor in zip(source.op.views(found[name]), tensors, strict=True):
            view.copy_(tensor.reshape(view.shape))
    return found


def expected(module: Any, ids: Any = None, mask: Any = None, **given: Any) -> oracle.Run:
    """The oracle's hidden states and attentions for that model."""
    as_numpy = {
        name: None if x is None else np.asarray(x) for name, x in {"ids": ids, "mask": mask, **given}.items()
    }
    return oracle.run(module.spec, parameters(module), **as_numpy)


def expected_logits(module: Any, run: oracle.Run) -> np.ndarray:
    """The oracle's logits at every token."""
    return oracle.logits(module.spec, parameters(module), run.hidden, module.row.head)


class SpecConfig(MptConfig):
    """A config that holds an arbitrary spec, so that tests of the block need no family."""

    def to_spec(self) -> ArchSpec:
        return self.__dict__["spec"].validate()


def spec_tree(_: Any) -> ModuleSpec:
    """A module tree that has every role."""
    attention = module(
        "Attention",
        "attention",
        qkv="qkv",
        q_norm="q_norm",
        k_norm="k_norm",
        out="out",
        attn_drop="attn_drop",
        out_drop="out_drop",
    )
    mlp = module("Mlp", "mlp", gate="gate", up="up", act="act", down="down", mlp_drop="mlp_drop")
    return module(
        "MptModel",
        "model",
        wte="embed",
        wpe="pos_embed",
        rel_bias="rel_bias",
        patch_embed="patch_embed",
        norm_e="embed_norm",
        drop="embed_drop",
        blocks=module("Block", "layer", norm_1="norm1", attn=attention, norm_2="norm2", mlp=mlp),
        norm_f="final_norm",
        rotary="rotary",
    )


def spec_keymap(config: Any, head: str | None) -> Any:
    return modules.keymap(spec_tree(config), MPT.heads, config.to_spec(), head=head, prefix="transformer.")


MPT = family("mpt")
SPEC_FAMILY = replace(MPT, tree=spec_tree, keymap=spec_keymap)


class SpecModel(monoblock.MptModel):
    family = SPEC_FAMILY


class SpecForCausalLM(monoblock.MptForCausalLM):
    family = SPEC_FAMILY
    make = staticmethod(lambda _: SpecModel)


def from_spec(spec: ArchSpec, seed: int = 0) -> Any:
    """A causal model of an arbitrary spec."""
    made = SpecConfig.__new__(SpecConfig)
    made.__dict__["spec"] = spec
    SpecConfig.__init__(made, vocab_size=spec.vocab, pad_token_id=PAD)
    return randomised(SpecForCausalLM(made), seed).eval()


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler for torch.compile."""
    import shutil

    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def chunks(
    module: Any, ids: torch.Tensor, mask: Any, sizes: tuple[int, ...], past: Any = None, **given: Any
) -> Any:
    """Logits (or last hidden states) of sequences processed in chunks of these sizes, with a KV cache."""
    start, outs = 0, []
    for size in sizes:
        stop = start + size
        visible = None if mask is None else mask[:, :stop]
        more = {k: v[:, :stop] if k == "sequence_id" else v for k, v in given.items()}
        out = module(ids[:, start:stop], attention_mask=visible, past_key_values=past, use_cache=True, **more)
        past = out.past_key_values
        outs.append(out[0])
        start = stop
    assert start == ids.shape[1]
    return torch.cat(outs, dim=1)


def one_by_one(count: int, prefill: int) -> tuple[int, ...]:
    """Chunk sizes: `prefill` tokens, then one token at a time."""
    return (prefill, *[1] * (count - prefill))


Check = Callable[..., None]


def same(a: Any, b: Any) -> bool:
    """Whether two models have the same parameter names and bitwise equal values."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
