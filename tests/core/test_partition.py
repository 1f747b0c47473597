"""The plan of tensor parallelism, by canonical names."""

from __future__ import annotations

import monoblock
from monoblock.partition import tensor_axes

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 62,
}


def plan(head: str | None, parts: int, **fields: object) -> dict[str, int | None]:
    config = monoblock.MistralConfig(**{**CONFIG, **fields})
    return tensor_axes(config.to_spec(), config.to_head(head) if head else None, parts)


def test_what_widens_by_outputs_what_narrows_by_inputs_the_vocabulary_by_rows() -> None:
    split = {name: axis for name, axis in plan("causal", 2).items() if axis is not None}
    assert split == {
        "embed.weight": 0,
        "blocks.0.attn.qkv.weight": 0,
        "blocks.0.attn.out.weight": 1,
        "blocks.0.mlp.gate_up.weight": 0,
        "blocks.0.mlp.down.weight": 1,
        "head.out.weight": 0,
    }


def test_what_does_not_divide_stays_whole() -> None:
    axes = plan("causal", 4)  # 62 rows of the vocabulary
    assert axes["embed.weight"] is None
    assert axes["head.out.weight"] is None
    assert axes["blocks.0.attn.qkv.weight"] == 0
    assert not any(axis is not None for axis in plan("causal", 5).values())


def test_small_heads_stay_whole() -> None:
    assert plan("sequence", 2)["head.out.weight"] is None


def test_biases_follow_the_outputs_of_their_layer() -> None:
    config = monoblock.MPNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    axes = tensor_axes(config.to_spec(), config.to_head("masked"), 4)
    assert axes["blocks.0.attn.qkv.bias"] == axes["blocks.0.mlp.up.bias"] == axes["head.out.bias"] == 0
    # Added once to a sum over the devices.
    assert axes["blocks.0.attn.out.bias"] is axes["blocks.0.mlp.down.bias"] is None
    assert axes["rel_bias.weight"] is axes["pos_embed.weight"] is axes["head.dense.weight"] is None
