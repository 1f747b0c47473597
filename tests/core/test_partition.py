"""Sharding plans of parameters by canonical name: tensor parallelism and FSDP."""

from __future__ import annotations

import re
from typing import Any

import pytest

import monoblock
from monoblock.partition import Axes, AxisNames, split

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 62,
}


SIZES = {"data": 2, "fsdp": 2, "x": 2, "y": 2}


def config(**fields: object) -> monoblock.MistralConfig:
    return monoblock.MistralConfig(**{**CONFIG, **fields})


def plan(
    head: str | None,
    sizes: dict[str, int],
    tensor: AxisNames = "x",
    fsdp: AxisNames = None,
    model_config: Any = None,
) -> dict[str, tuple[tuple[str, ...], ...]]:
    model_config = model_config or config()
    axes = Axes.of(sizes, tensor=tensor, fsdp=fsdp)
    return split(model_config.to_spec(), model_config.to_head(head) if head else None, axes, sizes)


def test_tensor_parallelism_is_column_parallel_then_row_parallel() -> None:
    found = {name: axes for name, axes in plan("causal", SIZES).items() if any(axes)}
    assert found == {
        "embed.weight": (("x",), ()),
        "blocks.0.attn.qkv.weight": (("x",), ()),
        "blocks.0.attn.out.weight": ((), ("x",)),
        "blocks.0.mlp.gate_up.weight": (("x",), ()),
        "blocks.0.mlp.down.weight": ((), ("x",)),
        "head.out.weight": (("x",), ()),
    }


def test_fsdp_shards_the_model_width_of_every_matrix() -> None:
    found = plan("causal", SIZES, tensor=None, fsdp="fsdp")
    assert {name: axes for name, axes in found.items() if any(axes)} == {
        "embed.weight": ((), ("fsdp",)),
        "blocks.0.attn.qkv.weight": ((), ("fsdp",)),
        "blocks.0.attn.out.weight": (("fsdp",), ()),
        "blocks.0.mlp.gate_up.weight": ((), ("fsdp",)),
        "blocks.0.mlp.down.weight": (("fsdp",), ()),
        "head.out.weight": ((), ("fsdp",)),
    }
    small = plan("sequence", SIZES, tensor=None, fsdp="fsdp")
    assert small["head.out.weight"] == ((), ("fsdp",))


def test_several_axes_shard_one_dimension() -> None:
    found = plan(None, SIZES, tensor=("x", "y"), fsdp=("fsdp",))
    assert found["blocks.0.attn.qkv.weight"] == (("x", "y"), ("fsdp",))
    assert found["embed.weight"] == ((), ("fsdp",))  # 62 rows are not divisible by 4


def test_batches_are_sharded_over_data_and_fsdp() -> None:
    assert Axes.of(SIZES, data=("x", "data"), fsdp=("data", "fsdp")).rows == ("x", "data", "fsdp")


@pytest.mark.parametrize(
    "model_config, sizes, tensor, fsdp, message",
    [
        (
            config(),
            {"x": 5},
            "x",
            None,
            "the 32 channels of the queries are not divisible by the 5 shards of the mesh's axis 'x': give a mesh "
            "whose size divides them, or tensor_axis=None",
        ),
        (config(), {"x": 32}, "x", None, "the 16 channels of the keys are not divisible by the 32 shards"),
        (config(intermediate_size=42), {"x": 4}, "x", None, "the 42 channels of the MLP are not divisible"),
        (
            config(),
            {"x": 2, "y": 3},
            None,
            ("x", "y"),
            "the 32 channels of the model's width are not divisible by the 6 shards of the mesh's axes 'x' and 'y': "
            "give a mesh whose size divides them, or fsdp_axis=None",
        ),
    ],
)
def test_indivisible_sizes_are_refused(
    model_config: Any, sizes: dict[str, int], tensor: AxisNames, fsdp: AxisNames, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan("causal", sizes, tensor, fsdp, model_config)


def test_an_indivisible_vocabulary_is_replicated() -> None:
    found = plan("causal", {"x": 4})  # 62 rows
    assert found["embed.weight"] == found["head.out.weight"] == ((), ())
    assert found["blocks.0.attn.qkv.weight"] == (("x",), ())


def test_small_heads_are_replicated() -> None:
    assert plan("sequence", SIZES)["head.out.weight"] == ((), ())


def test_biases_are_sharded_like_the_outputs_of_their_layer() -> None:
    model_config = monoblock.MPNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    found = plan("masked", SIZES, fsdp="fsdp", model_config=model_config)
    assert found["blocks.0.attn.qkv.bias"] == found["blocks.0.mlp.up.bias"] == (("x",),)
    assert found["head.out.bias"] == (("x",),)
    # Row-parallel layers add their bias after the all-reduce.
    assert found["blocks.0.attn.out.bias"] == found["blocks.0.mlp.down.bias"] == ((),)
    assert found["rel_bias.weight"] == found["pos_embed.weight"] == ((), ())
    assert found["head.dense.weight"] == ((), ("fsdp",))
