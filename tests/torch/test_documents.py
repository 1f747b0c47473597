"""Packed documents: with positions, lengths, segment ids or masks that separate them, each has the logits and gradients
that it has alone; and 4-D attention masks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import PAD, has_compiler, model
from measure import assert_close
from tiny_families import CLASSES, fields, logits_of, monoblock_model, transformers_model
from torch import Tensor

from monoblock.spec import Alibi, Learned

# fp32, 3 layers, logits up to 12: measured 3.7e-6, from a different order of summation.
ATOL = 1e-5

NAMES = {
    "mpt": "MptForCausalLM",
    "mistral": "MistralForCausalLM",
    "fuyu": "FuyuForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "mpnet": "MPNetForMaskedLM",
}
LENGTHS = (12, 5, 20, 1)  # longer and shorter than the windows


@functools.cache
def made(family: str) -> Any:
    if family == "mpt":
        return model(NAMES[family], attn={"sliding_window_size": 8})
    return monoblock_model(NAMES[family], **fields(CLASSES[NAMES[family]]))


def ids_of(rows: int = 1) -> Tensor:
    return torch.randint(10, 89, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))


def documents(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(LENGTHS, dim=1)


SEGMENTS = torch.cat([torch.full((length,), i) for i, length in enumerate(LENGTHS)])[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)


def positions(module: Any) -> dict[str, Tensor]:
    """Positions that restart in each document, with the offset of the model's table."""
    learned = module.spec.position(Learned)
    return {"position_ids": POSITIONS + (learned.offset if learned else 0)}


def document_mask(module: Any) -> Tensor:
    """(1, 1, q, k), True where a query may attend to a key of its document."""
    visible = SEGMENTS[0, :, None] == SEGMENTS[0]
    return (visible.tril() if module.spec.causal else visible)[None, None]


def separators(module: Any) -> dict[str, dict[str, Any]]:
    """Every form of arguments that separates documents. Masks leave the positions to `position_ids`."""
    own = {} if module.spec.position(Alibi) else positions(module)
    least = torch.finfo(torch.float32).min
    return {
        "positions": positions(module),
        "lengths": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 20, "max_length_k": 20},
        "lengths of queries": {"cu_seq_lens_q": ENDS, **own},
        "segment ids": {"sequence_id": SEGMENTS * 7 - 1, **own},
        "boolean mask": {"attention_mask": document_mask(module), **own},
        "additive mask": {"attention_mask": torch.zeros(()).where(document_mask(module), least), **own},
        "infinite mask": {"attention_mask": torch.zeros(()).where(document_mask(module), -torch.inf), **own},
    }


SEPARATORS = tuple(separators(model()))


def alone(module: Any, ids: Tensor) -> Tensor:
    return torch.cat([logits_of(module(document)) for document in documents(ids)], dim=1)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("family", NAMES)
def test_logits_and_gradients(family: str, separator: str, kernel: str) -> None:
    """Without gradients (the native kernel), and with them."""
    module, ids = made(family), ids_of()
    given = separators(module)[separator]
    module.set_attn_implementation(kernel)
    with torch.no_grad():
        expected = alone(module, ids)
        assert_close(f"{family} packed", module(ids, **given).logits, expected, ATOL)
        assert_close(f"{family} packed", module(ids, **given, output_attentions=True).logits, expected, ATOL)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)) / expected.numel()
    found, wanted = (
        gradients(module, run, weights)
        for run in (lambda: module(ids, **given).logits, lambda: alone(module, ids))
    )
    for name, value in wanted.items():
        assert_close(f"{family} packed, gradients", found[name], value, 1e-6)
    module.set_attn_implementation(None)


def gradients(module: Any, run: Any, weights: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (run() * weights).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.skipif(not has_compiler(), reason="flex attention needs a C++ compiler")
@pytest.mark.parametrize("separator", ["positions", "boolean mask"])
@torch.no_grad()
def test_flex_attention(separator: str) -> None:
    module, ids = (
        monoblock_model("MistralForCausalLM", **fields("mistral", num_hidden_layers=1, head_dim=16)),
        ids_of(),
    )
    expected = alone(module, ids)
    module.set_attn_implementation("flex_attention")
    assert_close("flex, packed", module(ids, **separators(module)[separator]).logits, expected, ATOL)


@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_rows_and_padding(family: str) -> None:
    """Rows with different documents, one of them with padding after, before or between them."""
    module, ids = made(family), ids_of(2)
    expected = alone(module, ids)
    shifted = {name: x.repeat(2, 1) for name, x in positions(module).items()}
    plain = module(ids[1:]).logits
    first = shifted["position_ids"].clone()
    first[1] = torch.arange(ids.shape[1]) + int(first[0, 0])
    found = module(ids, position_ids=first).logits
    assert_close(f"{family} packed and not", found, torch.cat((expected[:1], plain)), ATOL)
    for padded in (slice(37, None), slice(0, 12), slice(12, 17)):
        mask = torch.ones_like(ids)
        mask[0, padded] = 0
        pads = ids.masked_fill(mask == 0, PAD)
        found = module(pads, attention_mask=mask, **shifted).logits
        assert_close(f"{family} packed, padded", found, expected, ATOL, mask)


@pytest.mark.parametrize("separator", ["positions", "lengths", "segment ids", "boolean mask"])
@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_compiled(family: str, separator: str) -> None:
    module, ids = made(family), ids_of()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_close(
        f"{family} packed, compiled",
        compiled(ids, **separators(module)[separator]).logits,
        alone(module, ids),
        ATOL,
    )


@torch.no_grad()
def test_increasing_positions_are_one_document() -> None:
    """Only positions that restart begin a document; with a given cache, the tokens continue its sequence."""
    module, ids = made("mistral"), ids_of()
    jumping = torch.arange(ids.shape[1])[None] * 3
    masked = module(ids, position_ids=jumping, sequence_id=torch.zeros_like(ids)).logits
    assert torch.equal(module(ids, position_ids=jumping).logits, masked)
    past = module(ids[:, :17], use_cache=True).past_key_values
    found = module(ids[:, 17:20], past_key_values=past, position_ids=torch.tensor([[17, 18, 19]])).logits
    assert_close("cached", found, module(ids[:, :20]).logits[:, 17:], ATOL)


@torch.no_grad()
def test_bidirectional_prefix_mask() -> None:
    """A 4-D mask replaces the causal mask: attention within a prefix is bidirectional, as in transformers."""
    options = fields("mistral", sliding_window=None)
    theirs = transformers_model("MistralForCausalLM", **options)
    module, ids = monoblock_model("MistralForCausalLM", theirs, **options), ids_of(2)
    count = ids.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    mask[:9, :9] = True
    mask = mask.expand(2, 1, -1, -1).clone()
    mask[1, :, :, :4] = False  # with fully masked rows
    mask[1, :, :4] = False
    additive = torch.zeros(()).where(mask, torch.finfo(torch.float32).min)
    expected = theirs(ids, attention_mask=additive).logits
    for given in (mask, additive):
        for kernel in ("sdpa", "eager"):
            module.set_attn_implementation(kernel)
            assert_close("4-D mask", module(ids, attention_mask=given).logits, expected, 2 * ATOL)
    past = module(ids[:, :20], attention_mask=mask[:, :, :20, :20], use_cache=True).past_key_values
    found = module(ids[:, 20:], attention_mask=mask[:, :, 20:], past_key_values=past).logits
    assert_close("4-D mask, cached", found, expected[:, 20:], 2 * ATOL)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM"])
@torch.no_grad()
def test_packed_rows_equal_transformers(name: str) -> None:
    options = fields(CLASSES[name])
    theirs = transformers_model(name, **options)
    module, ids = monoblock_model(name, theirs, **options), ids_of()
    expected = theirs(ids, position_ids=POSITIONS, use_cache=False).logits
    assert_close(f"{name} packed", module(ids, position_ids=POSITIONS).logits, expected, 2 * ATOL)


@torch.no_grad()
def test_classifiers_take_4d_masks() -> None:
    module, ids = monoblock_model("MistralForSequenceClassification", **fields("mistral")), ids_of()
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    assert_close("4-D mask", module(ids, attention_mask=causal).logits, module(ids).logits, ATOL)


INVALID: dict[str, dict[str, Any]] = {
    r"a 4-D attention_mask must be .* = \(1, 1 or 6, 38, 38\)": {"attention_mask": torch.ones(1, 1, 38, 37)},
    "must be boolean .* or floating-point .* got torch.int64": {
        "attention_mask": torch.ones(1, 1, 38, 38, dtype=torch.int64)
    },
    r"sequence_id must be \(batch, tokens\) = \(1, 38\), got \(1, 37\)": {"sequence_id": torch.zeros(1, 37)},
    r"must both grow from 0 to the 38 tokens, got \[0, 37\]": {"cu_seq_lens_q": torch.tensor([0, 37])},
    r"both grow from 0 to the 38 tokens, got \[0, 38\] and \[1, 38\]": {
        "cu_seq_lens_q": torch.tensor([0, 38]),
        "cu_seq_lens_k": torch.tensor([1, 38]),
    },
    r"\(documents \+ 1,\) and equal, got \(2,\) and \(3,\)": {
        "cu_seq_lens_q": torch.tensor([0, 38]),
        "cu_seq_lens_k": torch.tensor([0, 3, 38]),
    },
    "must be the longest document's 20 tokens, got": {"cu_seq_lens_q": ENDS, "max_length_q": 19},
    "max_length_q and max_length_k come with": {"max_length_k": 20},
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_separators_raise(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("mistral")(ids_of(), **INVALID[message])


def test_cumulative_lengths_need_one_row() -> None:
    with pytest.raises(ValueError, match=r"input_ids must be \(1, tokens\), got 2 rows and 0 cached"):
        made("mistral")(ids_of(2), cu_seq_lens_q=torch.tensor([0, 38, 76]))
