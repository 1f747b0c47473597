"""ArchSpec: validation, immutability, ALiBi slopes, printing."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import oracle
import pytest

from monoblock.spec import (
    Alibi,
    ArchSpec,
    Attention,
    Buckets,
    Dropout,
    Learned,
    Mlp,
    Norm,
    QkNorm,
    RopeScaling,
    Rotary,
)

NORM = Norm(kind="layer", eps=1e-5, bias=True)
ATTENTION = Attention(heads=6, kv_heads=2, head_dim=8, scale=0.3, qkv_bias=True, out_bias=False)
SPEC = ArchSpec(
    vocab=50,
    width=48,
    attention=ATTENTION,
    mlp=Mlp(width=70, act="gelu", gated=False, bias=True),
    norm=NORM,
    windows=(None, 7),
    positions=(Rotary(dim=8, theta=1e4),),
)


def rotary(**changes: Any) -> ArchSpec:
    return replace(SPEC, positions=(replace(SPEC.positions[0], **changes),))


def attention(**changes: Any) -> ArchSpec:
    return replace(SPEC, attention=replace(ATTENTION, **changes))


SCALING = RopeScaling(kind="dynamic", factor=2.0, original_length=16)
RMS_WITH_BIAS = Norm(kind="rms", eps=1e-5, bias=True)
NO_EPS = replace(NORM, eps=0.0)

INVALID: dict[str, ArchSpec] = {
    "vocab must be at least 1, got 0": replace(SPEC, vocab=0),
    "width must be at least 1, got -3": replace(SPEC, width=-3),
    "layers must be at least 1, got 0": replace(SPEC, windows=()),
    "heads must be at least 1, got 0": attention(heads=0),
    "kv_heads must be at least 1, got 0": attention(kv_heads=0),
    "head_dim must be at least 1, got 0": attention(head_dim=0),
    "mlp width must be at least 1, got 0": replace(SPEC, mlp=replace(SPEC.mlp, width=0)),
    "heads (6) must be a multiple of kv_heads (4)": attention(kv_heads=4),
    "activation must be one of": replace(SPEC, mlp=replace(SPEC.mlp, act="mish")),
    "scale must be above 0, got 0": attention(scale=0),
    "clip must be above 0, got -1": attention(clip=-1),
    "softcap must be above 0, got nan": attention(softcap=float("nan")),
    "logit_softcap must be above 0, got 0": replace(SPEC, logit_softcap=0),
    "norm eps must be above 0, got 0.0": replace(SPEC, norm=NO_EPS),
    "embed_norm eps must be above 0": replace(SPEC, embed_norm=NO_EPS),
    "final_norm eps must be above 0": replace(SPEC, final_norm=NO_EPS),
    "qk_norm eps must be above 0": attention(qk_norm=QkNorm(norm=NO_EPS, span="head")),
    "final_norm is an RMS norm, which has no bias": replace(SPEC, final_norm=RMS_WITH_BIAS),
    "embed dropout must be in [0, 1), got 1.0": replace(SPEC, dropout=Dropout(embed=1.0)),
    "attention dropout must be in [0, 1), got -0.1": replace(SPEC, dropout=Dropout(attention=-0.1)),
    "residual dropout must be in [0, 1), got 2": replace(SPEC, dropout=Dropout(residual=2)),
    "embed_gradient must be in (0, 1], got 0": replace(SPEC, embed_gradient=0),
    "window of layer 1 must be at least 1 key, got 0": replace(SPEC, windows=(None, 0)),
    "window of layer 1 needs causal=True": replace(SPEC, causal=False),
    "each kind of position encoding may appear once": replace(SPEC, positions=SPEC.positions * 2),
    "a position table of 2 rows has none left after its offset of 2": replace(
        SPEC, positions=(Learned(size=2, offset=2),)
    ),
    "rotary dim must be even and at most head_dim (8), got 10": rotary(dim=10),
    "rotary dim must be even and at most head_dim (8), got 3": rotary(dim=3),
    "rotary theta must be above 0, got 0": rotary(theta=0),
    "rotary scaling needs a factor and an original length": rotary(scaling=replace(SCALING, factor=0)),
    "dynamic rotary scaling needs a rotary dim above 2": rotary(dim=2, scaling=SCALING),
    "alibi bias_max must be above 0, got 0": replace(SPEC, positions=(Alibi(bias_max=0),)),
    "bucket count must be even": replace(SPEC, positions=(Buckets(count=7, max_distance=128),)),
    "max_distance over a quarter": replace(SPEC, positions=(Buckets(count=32, max_distance=8),)),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_specs_are_refused(message: str) -> None:
    with pytest.raises(ValueError) as error:
        INVALID[message].validate("ThatConfig")
    assert str(error.value).startswith("ThatConfig does not describe a valid model: ")
    assert message in str(error.value)


def test_all_errors_are_listed() -> None:
    bad = replace(
        SPEC,
        vocab=0,
        norm=NO_EPS,
        windows=(0,),
        positions=(Alibi(bias_max=-1),),
        mlp=Mlp(width=0, act="tanh", gated=False, bias=False),
        attention=replace(ATTENTION, kv_heads=5, clip=0.0),
    )
    with pytest.raises(ValueError) as error:
        bad.validate()
    assert str(error.value).count(";") == 7, str(error.value)


def test_validate_returns_valid_specs() -> None:
    assert SPEC.validate() is SPEC
    bidirectional = replace(
        SPEC, causal=False, windows=(None,), positions=(Buckets(count=32, max_distance=128),)
    )
    assert bidirectional.validate() is bidirectional


def test_specs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.vocab = 3  # pyright: ignore
    with pytest.raises(TypeError):
        Norm("layer", 1e-5, True)  # pyright: ignore
    with pytest.raises(TypeError):
        Mlp(width=3, act="gelu", gated=False)  # pyright: ignore


def test_position_returns_the_encoding_of_a_kind() -> None:
    assert SPEC.position(Rotary) is SPEC.positions[0]
    assert SPEC.position(Alibi) is None
    assert SPEC.layers == 2


def test_alibi_slopes_of_some_head_counts() -> None:
    assert Alibi(bias_max=8).slopes(6) == (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    assert Alibi(bias_max=8).slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert Alibi(bias_max=16).slopes(2) == (2.0**-8, 2.0**-16)
    assert Alibi(bias_max=8).slopes(1) == (2.0**-8,)


@pytest.mark.parametrize("bias_max", [8, 16, 5.5])
def test_alibi_slopes_equal_the_oracle(bias_max: float) -> None:
    for heads in range(1, 70):
        expected = [oracle.slope(h, heads, bias_max) for h in range(heads)]
        assert list(Alibi(bias_max=bias_max).slopes(heads)) == pytest.approx(expected, rel=1e-15)


def test_str_has_every_field() -> None:
    text = str(replace(SPEC, attention=replace(ATTENTION, qk_norm=QkNorm(norm=NORM, span="head"))))
    names = {
        f.name for kind in (ArchSpec, Attention, Mlp, Norm, QkNorm, Dropout) for f in dataclasses.fields(kind)
    }
    assert [name for name in names if name not in text] == []
    assert "layers: 2" in text
    assert "theta" in text
