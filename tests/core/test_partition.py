"""Sharding plans of parameters by canonical name: tensor parallelism and FSDP."""

from __future__ import annotations

import re
from typing import Any

import pytest

import monoblock
from monoblock.families import FAMILIES, family
from monoblock.heads import KINDS
from monoblock.modules import MATRICES
from monoblock.partition import Axes, AxisNames, check_shards, shard_shapes, shard_spec, split, tensor_plan
from monoblock.spec import Alibi
from monoblock.tree import parameters, tied

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


# ---------------------------------------------------------------------------- slices of files


def files(model_config: Any, head: str | None) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Name -> style, dimension and sharded sizes."""
    found = tensor_plan(
        model_config.to_spec(),
        model_config.to_head(head) if head else None,
        family(model_config.model_type).keymap(model_config, head),
    )
    return {name: (shard.style, shard.dim, shard.sizes) for name, shard in found.items()}


def test_plan_of_separate_gated_and_grouped_matrices() -> None:
    found = files(config(), "causal")
    layer = "model.layers.0."
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == ("vocabulary", 0, (62,))
    assert found[f"{layer}self_attn.q_proj.weight"] == ("column", 0, (32,))
    assert found[f"{layer}self_attn.k_proj.weight"] == ("column", 0, (16,))
    assert found[f"{layer}self_attn.o_proj.weight"] == ("row", 1, (32,))
    assert (
        found[f"{layer}mlp.gate_proj.weight"] == found[f"{layer}mlp.up_proj.weight"] == ("column", 0, (48,))
    )
    assert found[f"{layer}mlp.down_proj.weight"] == ("row", 1, (48,))
    assert found["model.norm.weight"] == ("replicated", None, ())


def test_plan_of_fused_and_transposed_matrices() -> None:
    attention = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
    mpt = monoblock.MptConfig(d_model=32, n_heads=4, n_layers=1, attn_config=attention, no_bias=False)
    found = files(mpt, "causal")
    assert found["transformer.blocks.0.attn.Wqkv.weight"] == ("column", 0, (32, 16, 16))
    assert found["transformer.blocks.0.attn.Wqkv.bias"] == ("column", 0, (32, 16, 16))
    assert found["transformer.blocks.0.attn.out_proj.bias"] == ("replicated", None, ())
    assert found["lm_head.weight"] == found["transformer.wte.weight"]  # tied
    fuyu = monoblock.FuyuConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    found = files(fuyu, "causal")
    qkv = "model.language_model.layers.0.self_attn.query_key_value.weight"
    assert found[qkv] == ("column", 0, (96,))  # by head, so that a shard is contiguous
    gpt = monoblock.OpenAIGPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=64)
    found = files(gpt, "causal")
    assert found["transformer.h.0.attn.c_attn.weight"] == ("column", 1, (32, 32, 32))
    assert found["transformer.h.0.attn.c_proj.weight"] == ("row", 0, (32,))
    mpnet = monoblock.MPNetConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=63)
    found = files(mpnet, "masked")
    assert found["mpnet.encoder.relative_attention_bias.weight"] == ("heads", 1, (4,))
    assert found["lm_head.bias"] == ("vocabulary", 0, (63,))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_shards_cover_every_parameter_of_every_class_once(model_type: str) -> None:
    model_config: Any = family(model_type).config()
    spec, count = model_config.to_spec(), 4
    for row in family(model_type).classes:
        head = model_config.to_head(row.head) if row.head else None
        keymap = family(model_type).keymap(model_config, row.head)
        plan, shapes = tensor_plan(spec, head, keymap), parameters(spec, head)
        names = {name for c in (*shapes, *tied(spec, head)) for name in keymap.source(c).names}
        assert plan.keys() == names
        sharded = 0
        for name, shard in plan.items():
            parts = [one for rank in range(count) for one in shard.slices(rank, count)]
            covered = sorted(i for one in parts for i in range(one.start, one.stop))
            assert covered == list(range(sum(shard.sizes))), name
            sharded += shard.dim is not None
        assert sharded >= len(MATRICES) * spec.layers + (
            head is not None and KINDS[head.kind].size == "vocab"
        )
        shards = [shard_shapes(spec, head, rank, count) for rank in range(count)]
        for canonical, shape in shapes.items():
            for size, *held in zip(shape, *(one[canonical] for one in shards), strict=True):
                assert sum(held) == size or set(held) == {size}, canonical


def test_a_shard_is_a_spec_with_its_heads_and_slopes() -> None:
    spec = monoblock.MptConfig(d_model=48, n_heads=6, n_layers=1).to_spec()
    shards = [shard_spec(spec, rank, 3) for rank in range(3)]
    assert [s.attention.heads for s in shards] == [2, 2, 2]
    assert shards[0].mlp.width * 3 == spec.mlp.width and shards[0].vocab == spec.vocab
    slopes = [slope for s in shards for slope in s.position(Alibi).slopes(2)]  # pyright: ignore
    assert tuple(slopes) == spec.position(Alibi).slopes(6)  # pyright: ignore


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="the 2 key and value heads do not divide into 4 shards: give 1 or 2"
    ):
        check_shards(config().to_spec(), 4)
    with pytest.raises(
        ValueError, match="3: the 4 attention heads and the 2 key and value heads do not divide"
    ):
        check_shards(config().to_spec(), 3)
    with pytest.raises(ValueError, match="the 47 channels of the MLP do not divide into 2 shards: give 1"):
        check_shards(config(intermediate_size=47).to_spec(), 2)
    with pytest.raises(ValueError, match="tensor_parallel=0: give at least 1"):
        check_shards(config().to_spec(), 0)
