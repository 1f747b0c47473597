"""No field of the spec is ignored: changing any of them changes what the model computes.

Parameters are made by name, so that two models differ only in what the field does. A new field has no row in the
table: the first test fails then, until someone says what the field changes.
"""

from __future__ import annotations

import dataclasses
import typing
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import PAD, batch, from_spec

from monoblock import spec as specs
from monoblock.backends.pytorch.patches import with_patches
from monoblock.spec import (
    Alibi,
    ArchSpec,
    Attention,
    Buckets,
    Dropout,
    Learned,
    Mlp,
    Norm,
    Patches,
    QkNorm,
    RopeScaling,
    Rotary,
)

TOKENS = 23
LAYER, RMS = Norm(kind="layer", eps=1e-3, bias=True), Norm(kind="rms", eps=1e-3, bias=False)
BASE = ArchSpec(
    vocab=89,
    width=24,
    attention=Attention(heads=4, kv_heads=2, head_dim=8, scale=0.3, qkv_bias=True, out_bias=True),
    mlp=Mlp(width=40, act="gelu", gated=False, bias=True),
    norm=LAYER,
    windows=(None, None),
    positions=(Alibi(bias_max=8),),
    final_norm=LAYER,
)


def at(spec: Any, path: str, value: Any) -> Any:
    """The spec with that field changed; a position or a layer is named by its index."""
    first, _, rest = path.partition(".")
    if isinstance(spec, tuple):
        i = int(first)
        return (*spec[:i], at(spec[i], rest, value) if rest else value, *spec[i + 1 :])
    return replace(spec, **{first: at(getattr(spec, first), rest, value) if rest else value})


def with_positions(*positions: Any, **changes: Any) -> ArchSpec:
    return replace(BASE, positions=positions, **changes)


LEARNED = with_positions(Learned(size=40))
BY_ID = with_positions(Learned(size=40, offset=2, pad_id=PAD))
ROTARY = with_positions(Rotary(dim=8, theta=1e4))
BUCKETS = with_positions(Buckets(count=8, max_distance=20), causal=False)
QK_NORM = replace(BASE, attention=replace(BASE.attention, qk_norm=QkNorm(norm=LAYER, span="width")))


def scaled(kind: str, **more: Any) -> ArchSpec:
    # An original length that the text (23 tokens) exceeds.
    scaling = RopeScaling(kind=kind, factor=2.0, original_length=12, **more)
    return with_positions(Rotary(dim=8, theta=50.0, scaling=scaling))


LINEAR = RopeScaling(kind="linear", factor=2.0, original_length=9)
YARN = scaled("yarn", beta_fast=1.5, beta_slow=0.1)
SEGMENTED = replace(BASE, attention=replace(BASE.attention, by_segment=True))
IMAGES = replace(BASE, patches=Patches(size=12, token_id=7))
SCALINGS = ("linear", "dynamic", "yarn", "llama3")
FACTOR, LENGTH = "positions.0.scaling.factor", "positions.0.scaling.original_length"

# Class and field -> one spec or several, the field's path in it, another value, and what must change then.
MUTANTS: dict[str, list[tuple[ArchSpec, str, Any, str]]] = {
    "Norm.kind": [(replace(BASE, norm=replace(LAYER, bias=False)), "norm.kind", "rms", "output")],
    "Norm.eps": [
        (BASE, "norm.eps", 0.1, "output"),
        (BASE, "final_norm.eps", 0.1, "output"),
        (QK_NORM, "attention.qk_norm.norm.eps", 0.1, "output"),
        (replace(BASE, embed_norm=LAYER), "embed_norm.eps", 0.1, "output"),
        (replace(BASE, norm=RMS), "norm.eps", 0.1, "output"),
    ],
    "Norm.bias": [
        (BASE, "norm.bias", False, "output"),
        (BASE, "final_norm.bias", False, "output"),
        (QK_NORM, "attention.qk_norm.norm.bias", False, "output"),
    ],
    "QkNorm.norm": [(QK_NORM, "attention.qk_norm.norm", RMS, "output")],
    "QkNorm.span": [(QK_NORM, "attention.qk_norm.span", "head", "output")],
    "Learned.size": [(LEARNED, "positions.0.size", 30, "shapes")],
    "Learned.offset": [(LEARNED, "positions.0.offset", 2, "output")],
    "Learned.pad_id": [(BY_ID, "positions.0.pad_id", 50, "output"), (BY_ID, "positions.0.pad_id", None, "unmasked")],
    "RopeScaling.kind": [(scaled("linear"), "positions.0.scaling.kind", kind, "output") for kind in SCALINGS[1:]],
    "RopeScaling.factor": [(scaled(kind), FACTOR, 3.0, "output") for kind in SCALINGS],
    "RopeScaling.original_length": [(scaled(kind), LENGTH, 20, "output") for kind in SCALINGS[1:]],
    "RopeScaling.low_freq_factor": [(scaled("llama3"), "positions.0.scaling.low_freq_factor", 0.5, "output")],
    "RopeScaling.high_freq_factor": [(scaled("llama3"), "positions.0.scaling.high_freq_factor", 2.0, "output")],
    "RopeScaling.beta_fast": [(YARN, "positions.0.scaling.beta_fast", 0.5, "output")],
    "RopeScaling.beta_slow": [(YARN, "positions.0.scaling.beta_slow", 0.9, "output")],
    "RopeScaling.attention_factor": [(scaled("yarn"), "positions.0.scaling.attention_factor", 1.5, "output")],
    "Rotary.dim": [(ROTARY, "positions.0.dim", 4, "output")],
    "Rotary.theta": [(ROTARY, "positions.0.theta", 100.0, "output")],
    "Rotary.scaling": [(ROTARY, "positions.0.scaling", LINEAR, "output")],
    "Alibi.bias_max": [(BASE, "positions.0.bias_max", 16, "output")],
    "Buckets.count": [(BUCKETS, "positions.0.count", 16, "output")],
    "Buckets.max_distance": [(BUCKETS, "positions.0.max_distance", 9, "output")],
    "Attention.heads": [(BASE, "attention.heads", 2, "shapes")],
    "Attention.kv_heads": [(BASE, "attention.kv_heads", 4, "shapes")],
    "Attention.head_dim": [(BASE, "attention.head_dim", 4, "shapes")],
    "Attention.scale": [(BASE, "attention.scale", 0.6, "output")],
    "Attention.qkv_bias": [(BASE, "attention.qkv_bias", False, "output")],
    "Attention.out_bias": [(BASE, "attention.out_bias", False, "output")],
    "Attention.clip": [(BASE, "attention.clip", 0.5, "output")],
    "Attention.softcap": [(BASE, "attention.softcap", 0.5, "output")],
    "Attention.qk_norm": [(BASE, "attention.qk_norm", QkNorm(norm=LAYER, span="head"), "output")],
    "Attention.by_segment": [(SEGMENTED, "attention.by_segment", False, "segments")],
    "Attention.masked_rows": [(BASE, "attention.masked_rows", rule, "padding") for rule in ("past", "valid")],
    "Mlp.width": [(BASE, "mlp.width", 30, "shapes")],
    "Mlp.act": [(BASE, "mlp.act", act, "output") for act in specs.ACTIVATIONS if act != "gelu"],
    "Mlp.gated": [(BASE, "mlp.gated", True, "output")],
    "Mlp.bias": [(BASE, "mlp.bias", False, "output")],
    "Dropout.embed": [(BASE, "dropout.embed", 0.3, "training")],
    "Dropout.attention": [(BASE, "dropout.attention", 0.3, "training")],
    "Dropout.residual": [(BASE, "dropout.residual", 0.3, "training")],
    "Patches.size": [(IMAGES, "patches.size", 6, "shapes")],
    "Patches.token_id": [(IMAGES, "patches.token_id", 8, "patches")],
    "ArchSpec.vocab": [(BASE, "vocab", 97, "shapes")],
    "ArchSpec.width": [(BASE, "width", 32, "shapes")],
    "ArchSpec.attention": [(BASE, "attention", replace(BASE.attention, scale=1.0), "output")],
    "ArchSpec.mlp": [(BASE, "mlp", replace(BASE.mlp, act="relu"), "output")],
    "ArchSpec.norm": [(BASE, "norm", RMS, "output")],
    "ArchSpec.windows": [(BASE, "windows", windows, "output") for windows in ((None, 5), (5, None), (None,))],
    "ArchSpec.positions": [(BASE, "positions", (), "output")],
    "ArchSpec.placement": [(BASE, "placement", "post", "output")],
    "ArchSpec.causal": [(BASE, "causal", False, "output")],
    "ArchSpec.embed_norm": [(BASE, "embed_norm", LAYER, "output")],
    "ArchSpec.final_norm": [(BASE, "final_norm", None, "output")],
    "ArchSpec.dropout": [(BASE, "dropout", Dropout(embed=0.2), "training")],
    "ArchSpec.tie_head": [(BASE, "tie_head", False, "output")],
    "ArchSpec.logit_scale": [(BASE, "logit_scale", 0.5, "output")],
    "ArchSpec.logit_softcap": [(BASE, "logit_softcap", 1.0, "output")],
    "ArchSpec.embed_gradient": [(BASE, "embed_gradient", 0.5, "gradient")],
    "ArchSpec.patches": [(BASE, "patches", Patches(size=12, token_id=7), "shapes")],
    "ArchSpec.init_std": [(BASE, "init_std", 0.1, "initial")],
}  # fmt: skip

CASES = [
    pytest.param(name, row, id=f"{name}-{i}") for name, rows in MUTANTS.items() for i, row in enumerate(rows)
]


def dataclasses_of(kind: Any, found: set[type]) -> set[type]:
    """The spec's classes, wherever they are nested."""
    if dataclasses.is_dataclass(kind) and kind not in found:
        found.add(kind)
        for hint in typing.get_type_hints(kind).values():
            dataclasses_of(hint, found)
    for argument in typing.get_args(kind):
        dataclasses_of(argument, found)
    return found


def test_every_field_has_a_mutant() -> None:
    classes = dataclasses_of(ArchSpec, set())
    named = {c for c in vars(specs).values() if isinstance(c, type) and dataclasses.is_dataclass(c)}
    assert named == classes, "a class of spec.py that no spec holds"
    fields = {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c)}
    assert fields == MUTANTS.keys()


def built(spec: ArchSpec) -> Any:
    """A model whose parameters depend on their names and shapes only."""
    module = from_spec(spec)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm else 0.3 * noise)
    return module


def observed(spec: ArchSpec, what: str) -> Any:
    """What a model of the spec does, on a left-padded batch that is longer than every window and trained length."""
    module = built(spec)
    ids, mask = batch("left")
    if what == "shapes":
        return {name: tuple(p.shape) for name, p in module.named_parameters()}
    if what == "initial":
        module.init_weights()
        return module.get_input_embeddings().weight.std()
    if what == "gradient":
        module(ids, attention_mask=mask).logits.square().mean().backward()
        return module.get_input_embeddings().weight.grad
    given: dict[str, Any] = {"attention_mask": mask}
    if what == "training":
        torch.manual_seed(0)
        module.train()
    if what == "unmasked":  # padding found by its id alone
        given = {}
    if what == "segments" and spec.attention.by_segment:
        given["sequence_id"] = (torch.arange(TOKENS) > 15).long().expand(3, -1)
    with torch.no_grad():
        if what == "patches":
            ids = torch.tensor([[7, 8] * 5] * 3)  # as many tokens of either id as patches
            x = module.get_input_embeddings()(ids)
            patches = torch.ones(3, 5, spec.patches.size)
            return with_patches(spec, module.bare.role("patch_embed"), x, ids, patches, None)
        return module(ids, **given).logits[mask == (0 if what == "padding" else 1)]


@pytest.mark.parametrize(("name", "row"), CASES)
def test_a_changed_field_changes_the_model(name: str, row: tuple[ArchSpec, str, Any, str]) -> None:
    spec, path, value, what = row
    before, after = observed(spec, what), observed(at(spec, path, value), what)
    if what == "shapes":
        assert before != after
        return
    assert torch.isfinite(after).all()
    difference = (before - after).abs().max()
    assert difference > 1e-3, f"{name} has no effect on {what}"


@pytest.mark.parametrize(
    "spec",
    [BASE, LEARNED, ROTARY, BUCKETS, QK_NORM],
    ids=["alibi", "learned", "rotary", "buckets", "qk norm"],
)
def test_observations_are_deterministic(spec: ArchSpec) -> None:
    """Observations are deterministic."""
    assert torch.equal(observed(spec, "output"), observed(replace(spec), "output"))
