"""MPNet against transformers: relative position buckets, positions that skip padding, and the masked-LM head."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from helpers import PADDINGS, expected, parameters
from measure import assert_close
from tiny_families import fields, model_inputs, model_pair, monoblock_model, pair
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from monoblock import MPNetConfig
from monoblock.backends.pytorch.ops import relative_position_bucket

ATOL = 2e-5  # fp32 through the fused kernels
NAME = "MPNetModel"


def test_buckets() -> None:
    """Every distance within the longest input, against transformers and the oracle."""
    distance = torch.arange(-600, 601)
    ours = relative_position_bucket(distance, 32, 128)
    assert torch.equal(ours, MPNetEncoder.relative_position_bucket(distance))
    for count, farthest in ((32, 128), (20, 50), (8, 128), (4, 9), (64, 128)):
        defined = [oracle.bucket(int(d), count, farthest) for d in distance]
        assert relative_position_bucket(distance, count, farthest).tolist() == defined


@pytest.mark.parametrize("buckets", [8, 20, 32, 64])
@torch.no_grad()
def test_relative_attention_num_buckets(buckets: int) -> None:
    """transformers allocates that many buckets, and computes bucket indices for 32."""
    long = {"max_position_embeddings": 202}
    ours = monoblock_model(NAME, **fields("mpnet", relative_attention_num_buckets=buckets, **long))
    assert ours.at("rel_bias").weight.shape == (buckets, 6)
    ids = torch.randint(10, 89, (2, 150), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 140:] = 0
    ids = ids.masked_fill(mask == 0, 1)
    run = expected(ours, ids, mask)
    for kernel in ("sdpa", "eager"):
        ours.set_attn_implementation(kernel)
        found = ours(ids, attention_mask=mask, output_hidden_states=True)
        for a, b in zip(found.hidden_states, run.hidden_states, strict=True):
            assert_close(f"MPNet, {buckets} buckets", a, b, ATOL)
    if buckets == 32:
        theirs, _ = model_pair(NAME, **fields("mpnet", **long))
        same = monoblock_model(NAME, theirs, **fields("mpnet", **long))
        there = theirs(ids, attention_mask=mask).last_hidden_state
        assert_close("MPNet, 150 tokens", same(ids, attention_mask=mask).last_hidden_state, there, ATOL)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_positions_with_padding_anywhere(padding: str) -> None:
    theirs, ours = pair(NAME)
    ids, mask = model_inputs(NAME, padding)
    ids[:, 4], ids[2, 11], ids[1, 20] = 1, 1, 1  # pad ids within the sequences, masked or not
    for given in ({"attention_mask": mask}, {}, {"attention_mask": (ids != 1).long()}):
        found, there = ours(ids, **given), theirs(ids, **given)
        assert_close("MPNet, pads anywhere", found.last_hidden_state, there.last_hidden_state, ATOL)
        run = expected(ours, ids, given.get("attention_mask"))
        assert_close("MPNet, oracle", found.last_hidden_state, run.hidden, ATOL)


@torch.no_grad()
def test_positions_of_embeddings_follow_the_mask() -> None:
    """With inputs_embeds, only the attention mask marks padding; transformers counts all positions."""
    theirs, ours = pair(NAME)
    ids, mask = model_inputs(NAME, "left")
    embeds = ours.get_input_embeddings()(ids)
    found = ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    by_ids = ours(ids, attention_mask=mask).last_hidden_state
    assert_close("MPNet, padded embeddings", found, by_ids, ATOL, mask)
    assert_close(
        "MPNet, embeddings",
        ours(inputs_embeds=embeds).last_hidden_state,
        theirs(inputs_embeds=embeds).last_hidden_state,
        ATOL,
    )


@torch.no_grad()
def test_another_pad_token() -> None:
    """transformers takes 1 as the pad id whatever the config has."""
    given = fields("mpnet", pad_token_id=5, max_position_embeddings=40)
    ours = monoblock_model(NAME, **given)
    assert ours.spec.positions[0].offset == 6
    ids, mask = model_inputs(NAME, "right")
    ids = ids.masked_fill(mask == 0, 5)
    run = expected(ours, ids, mask)
    assert_close("another pad token", ours(ids, attention_mask=mask).last_hidden_state, run.hidden, ATOL)


@torch.no_grad()
def test_two_positions_are_reserved() -> None:
    _, ours = pair(NAME)
    assert ours.config.max_position_embeddings == 66
    assert ours(torch.randint(10, 80, (1, 64))).last_hidden_state.shape[1] == 64
    with pytest.raises(
        ValueError,
        match="the model has 64 learned positions, but the sequence, cache included, has 65 tokens",
    ):
        ours(torch.randint(10, 80, (1, 65)))
    padded = torch.randint(10, 80, (1, 70))
    padded[:, 60:] = 1
    assert ours(padded, attention_mask=(padded != 1).long()).last_hidden_state.shape[1] == 70


@torch.no_grad()
def test_masked_head_equals_the_oracle() -> None:
    theirs, ours = pair("MPNetForMaskedLM")
    ids, mask = model_inputs("MPNetForMaskedLM", "right")
    params = parameters(ours)
    run = expected(ours, ids, mask)
    x = oracle.ACTIVATIONS["gelu"](oracle.linear(run.hidden, params, "head.dense"))
    x = oracle.norm(x, ours.head_spec.norm, params, "head.norm")
    logits = oracle.linear(x, {**params, "head.out.weight": params["embed.weight"]}, "head.out")
    assert_close("masked head", ours(ids, attention_mask=mask).logits, logits, ATOL)
    assert_close("masked head", theirs(ids, attention_mask=mask).logits, logits, ATOL)


@torch.no_grad()
def test_choices() -> None:
    theirs, ours = pair("MPNetForMultipleChoice")
    ids, mask = model_inputs("MPNetForMultipleChoice", "right")
    found, there = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask)
    assert found.logits.shape == (3, 2)
    assert_close("choices", found.logits, there.logits, ATOL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hidden_size": 100},
            "MPNetConfig.hidden_size (100) must be a multiple of num_attention_heads (12)",
        ),
        ({"relative_attention_num_buckets": 7}, "bucket count must be even"),
        ({"max_position_embeddings": 2}, "a position table of 2 rows has none left after its offset of 2"),
    ],
)
def test_inconsistent_fields_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        MPNetConfig(**given).to_spec()
    assert message in str(error.value)
