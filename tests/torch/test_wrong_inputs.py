"""Invalid inputs of calls and of `generate` raise with a message of one line: the expected and the given value."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import invalid_inputs
import numpy as np
import pytest
import torch
from helpers import model
from measure import assert_close
from tiny_families import CLASSES, fields, monoblock_model

import monoblock
from monoblock.backends.pytorch import inputs

IDS = torch.arange(10, 22).reshape(2, 6)
INVALID: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"hold the token 89, but the model's vocabulary has the ids 0 to 88": (
        ValueError,
        {"input_ids": IDS + 68},
    ),
    r"hold the token -100": (ValueError, {"input_ids": torch.full((1, 3), -100)}),
    r"the input has no tokens": (ValueError, {"input_ids": torch.zeros(1, 0, dtype=torch.long)}),
    r"input_ids must be integers \(batch, tokens\), got torch.float32": (
        ValueError,
        {"input_ids": IDS.float()},
    ),
    r"input_ids must be integers \(batch, tokens\), got torch.int64 \(6,\)": (
        ValueError,
        {"input_ids": IDS[0]},
    ),
    r"inputs_embeds must be \(batch, tokens, 36\), got \(2, 6, 35\)": (
        ValueError,
        {"inputs_embeds": torch.zeros(2, 6, 35)},
    ),
    r"inputs_embeds must be floating-point numbers, got torch.int64": (
        ValueError,
        {"inputs_embeds": torch.zeros(2, 6, 36, dtype=torch.long)},
    ),
    r"input_ids must be integers \(batch, tokens\), got torch.bool": (
        ValueError,
        {"input_ids": IDS > 12},
    ),
    r"input_ids must be a torch.Tensor, got list: torch.tensor\(\) makes one": (
        TypeError,
        {"input_ids": IDS.tolist()},
    ),
    r"input_ids must be a torch.Tensor, got dict: model\(\*\*inputs\)": (
        TypeError,
        {"input_ids": {"a": IDS}},
    ),
    r"attention_mask must be a torch.Tensor, got ndarray": (
        TypeError,
        {"input_ids": IDS, "attention_mask": np.ones((2, 6))},
    ),
    r"labels must be a torch.Tensor, got ndarray": (TypeError, {"input_ids": IDS, "labels": IDS.numpy()}),
    r"a floating-point attention_mask is added to the scores: it must not hold NaN or inf": (
        ValueError,
        {"input_ids": IDS, "attention_mask": torch.full((2, 1, 6, 6), float("nan"))},
    ),
    r"attention_mask must be \(batch, tokens\) = \(2, 6\), .* got \(2, 5\)": (
        ValueError,
        {"input_ids": IDS, "attention_mask": torch.ones(2, 5)},
    ),
    r"attention_mask must be .* got \(2, 6, 6\)": (
        ValueError,
        {"input_ids": IDS, "attention_mask": torch.ones(2, 6, 6)},
    ),
    r"cache_position must be 0 to 5": (ValueError, {"input_ids": IDS, "cache_position": torch.arange(1, 7)}),
    r"position_ids must be \(batch, tokens\) = \(2, 6\), got \(1, 7\)": (
        ValueError,
        {"input_ids": IDS, "position_ids": torch.arange(7)[None]},
    ),
    r"past_key_values must hold 2 layers, got 1": (
        ValueError,
        {"input_ids": IDS, "past_key_values": ((IDS, IDS),)},
    ),
    r"past_key_values must hold keys of \(batch, heads, tokens, head_dim\) or .* got \(5, 6, 7\) for a batch of 2": (
        ValueError,
        {"input_ids": IDS, "past_key_values": ((torch.zeros(5, 6, 7),) * 2,) * 2},
    ),
    r"past_key_values must be a Cache or a tuple of layers, got dict": (
        ValueError,
        {"input_ids": IDS, "past_key_values": {}},
    ),
    r"labels have 5 tokens, but logits have 6": (ValueError, {"input_ids": IDS, "labels": IDS[:, :5]}),
    r"MptForCausalLM has no argument 'attn_mask'; it takes: input_ids": (
        TypeError,
        {"input_ids": IDS, "attn_mask": IDS},
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_shapes_and_types_raise(message: str) -> None:
    error, given = INVALID[message]
    with pytest.raises(error, match=message) as caught:
        model()(**given)
    assert "\n" not in str(caught.value)


@functools.cache
def made(name: str) -> Any:
    return (
        model(name, num_labels=4)
        if name.startswith("Mpt")
        else monoblock_model(name, **fields(CLASSES[name]))
    )


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.as_tensor(x) for name, x in given.items()}


@pytest.mark.parametrize("case", invalid_inputs.INVALID)
def test_invalid_values_raise(case: str) -> None:
    name, given = invalid_inputs.arguments(case)
    with pytest.raises(ValueError, match=invalid_inputs.INVALID[case][2]) as caught:
        made(name)(**tensors(given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
@pytest.mark.parametrize("case", invalid_inputs.VALID)
def test_integers_of_any_width_are_ids(case: str, scheme: str) -> None:
    """Used as indices, uint8 would be a mask."""
    ours = monoblock_model("GPTNeoForCausalLM", **fields("gpt_neo"))
    ours = ours.quantize(scheme) if scheme else ours
    given = tensors(invalid_inputs.VALID[case])
    expected = ours(**{name: x.long() for name, x in given.items()}).logits
    assert torch.equal(ours(**given).logits, expected)


def test_rope_positions_may_be_any_integers() -> None:
    """RoPE has no table: attention does not change with an offset of all positions."""
    ours, ids = made("MistralModel"), torch.as_tensor(invalid_inputs.IDS)
    here = ours(ids).last_hidden_state
    for start in (-5, 1000):
        moved = ours(ids, position_ids=(torch.arange(8) + start)[None]).last_hidden_state
        assert_close(f"moved by {start}", moved, here, 1e-4)


@pytest.mark.parametrize("case", invalid_inputs.REFUSED)
def test_generate_raises_before_it_computes(case: str) -> None:
    """And before the streamer is called."""
    ours, streamed = made("GPTNeoForCausalLM"), []
    streamer = SimpleNamespace(put=streamed.append, end=lambda: None)
    given = {
        name: torch.as_tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in invalid_inputs.refused(case).items()
    }
    with pytest.raises(ValueError, match=invalid_inputs.REFUSED[case][1]) as caught:
        ours.generate(**given)
    assert "\n" not in str(caught.value)
    if given["input_ids"] is not None and len(given["input_ids"]):
        one_row = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        if case not in ("a pad token", "too many beams", "another tokenizer's prompt"):
            with pytest.raises(ValueError, match=invalid_inputs.REFUSED[case][1]):
                ours.generate(**one_row, streamer=streamer)
    assert streamed == []


def test_generate_raises_on_other_arrays() -> None:
    for name in ("position_ids", "inputs_embeds", "token_type_ids"):
        ours = made("GPTNeoForCausalLM" if name != "token_type_ids" else "OpenAIGPTLMHeadModel")
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got ndarray"):
            ours.generate(IDS, max_new_tokens=2, **{name: np.zeros((2, 6))})
    with pytest.raises(ValueError, match="past_key_values must be a Cache or a tuple of layers, got str"):
        made("GPTNeoForCausalLM").generate(IDS, past_key_values="abc", max_new_tokens=2)


def test_all_positions_can_be_used() -> None:
    """With every kind of decoding; the cache is full then, without the last token."""
    ours, ids = made("OpenAIGPTLMHeadModel"), torch.as_tensor(invalid_inputs.IDS[:1])
    plain = ours.generate(ids, max_new_tokens=57, eos_token_id=None)
    assert plain.shape == (1, 65)
    for more in (
        {"num_beams": 1, "use_cache": False},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": ours},
    ):
        assert torch.equal(ours.generate(ids, max_new_tokens=57, eos_token_id=None, **more), plain)
    assert ours.generate(ids, max_new_tokens=57, eos_token_id=None, num_beams=2).shape == (1, 65)
    assert (ours.max_positions, ours.room(8), ours.room(65), model().room(8)) == (64, 57, 0, None)


@pytest.mark.parametrize("seed", invalid_inputs.EXTREME_SEEDS)
def test_seeds_of_64_bits(seed: int) -> None:
    ours = made("GPTNeoForCausalLM")
    one, two = (ours.generate(IDS, max_new_tokens=3, do_sample=True, seed=seed) for _ in range(2))
    assert torch.equal(one, two)


def test_invalid_positional_arguments() -> None:
    with pytest.raises(TypeError, match="takes at most 11 positional arguments, got 12"):
        model()(*[None] * 12)
    with pytest.raises(TypeError, match="got 'input_ids' twice"):
        model()(IDS, input_ids=IDS)


def test_full_static_cache() -> None:
    cache = monoblock.StaticCache(max_cache_len=8)
    out = model()(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(
        ValueError, match="the static cache has room for 8 tokens: 6 are cached and the input has 6"
    ):
        model()(IDS, past_key_values=out.past_key_values)
    with pytest.raises(ValueError, match="max_cache_len of at least 1"):
        monoblock.StaticCache(max_cache_len=0)


def test_empty_prompts_raise() -> None:
    with pytest.raises(ValueError, match=r"no tokens|empty"):
        model().generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)


def test_generate_of_a_class_without_a_language_model_head() -> None:
    with pytest.raises(TypeError, match=r"generate with a \.\.\.ForCausalLM class"):
        model("MptForTokenClassification").generate(IDS)


def test_position_ids_without_effect_warn_once(logs: pytest.LogCaptureFixture) -> None:
    inputs.warn_once.cache_clear()
    for _ in range(2):
        model()(IDS, position_ids=torch.arange(6)[None])
    assert sum("position_ids have no effect" in message for message in logs.messages) == 1


def test_training_with_packed_documents_needs_sequence_id() -> None:
    packed = model(attn={"attn_uses_sequence_id": True})
    packed(IDS)  # one document per row, as in generation
    packed.train()
    with pytest.raises(ValueError, match="training needs sequence_id"):
        packed(IDS)
    packed(IDS, sequence_id=torch.zeros_like(IDS))
