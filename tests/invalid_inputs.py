"""Invalid arguments of calls, and the error message of each, the same in every framework."""

from __future__ import annotations

from typing import Any

import numpy as np

VOCAB, LABELS = 89, 4
IDS = np.arange(10, 26).reshape(2, 8)
CHOICES = IDS.reshape(1, 2, 8)
NAN = float("nan")


def _all(value: Any) -> np.ndarray:
    return np.full((2, 8), value)


_POSITIONS = r"position_ids must be 0 to 63, the rows of the position table, got -1"
# case -> class, arguments in addition to the ids, error message.
INVALID: dict[str, tuple[str, dict[str, Any], str]] = {
    "mask of NaN": (
        "GPTNeoForCausalLM",
        {"attention_mask": _all(NAN)},
        "attention_mask .* must be 1 .*and 0 .*got NaN",
    ),
    "additive mask": (
        "MptForCausalLM",
        {"attention_mask": _all(-np.inf)},
        "attention_mask .* must be 1 .*got -inf",
    ),
    "negative mask": ("MistralModel", {"attention_mask": _all(-1)}, "attention_mask .* must be 1 .*got -1"),
    "negative positions": ("GPTNeoForCausalLM", {"position_ids": _all(-1)}, _POSITIONS),
    "positions beyond the table": (
        "OpenAIGPTModel",
        {"position_ids": _all(64)},
        "64 learned positions, but .* has 65 tokens",
    ),
    "positions beyond fp32": (
        "MistralModel",
        {"position_ids": _all(2**40)},
        "position_ids must be at most 16777216, .*got 1099511627776",
    ),
    "fractional positions": (
        "MistralModel",
        {"position_ids": _all(0.5)},
        "position_ids must be integers",
    ),
    "label beyond the vocabulary": (
        "MptForCausalLM",
        {"labels": _all(VOCAB)},
        r"labels must be 0 to 88 \(-100 stands for none\), but go from 89 to 89",
    ),
    "negative label": ("MPNetForMaskedLM", {"labels": _all(-1)}, "labels must be 0 to 88 .*from -1 to -1"),
    "label of a token": ("GPTNeoForTokenClassification", {"labels": _all(LABELS)}, "labels must be 0 to 3 "),
    "labels of more rows": (
        "MistralForCausalLM",
        {"labels": np.zeros((3, 8), np.int64)},
        r"labels must be \(batch, tokens\) = \(2, 8\), got \(3, 8\)",
    ),
    "fractional labels": (
        "MistralForCausalLM",
        {"labels": _all(1.5)},
        "labels must be integers, the classes 0 to 88 or -100",
    ),
    "label of a row": (
        "MistralForSequenceClassification",
        {"labels": np.array([0, LABELS])},
        "labels must be 0 to 3 .*from 0 to 4",
    ),
    "labels of too many rows": (
        "MPNetForSequenceClassification",
        {"labels": np.array([0, 1, 2])},
        r"labels must be \(2,\), one class each, got \(3,\)",
    ),
    "integer multi-label targets": (
        "GPTNeoForSequenceClassification",
        {"labels": np.ones((2, LABELS), np.int64)},
        r"labels \(2, 4\) hold one number per class.*problem_type='multi_label_classification', or give floating",
    ),
    "multi-label targets of another shape": (
        "MptForSequenceClassification",
        {"labels": np.ones((2, LABELS - 1), np.float32)},
        r"labels of a multi_label_classification must be \(2, 4\), one number per class, got \(2, 3\)",
    ),
    "spans of more rows": (
        "MistralForQuestionAnswering",
        {"start_positions": np.array([0, 1, 2]), "end_positions": np.array([1, 2])},
        r"start_positions must be \(2,\), one token position per row, got \(3,\)",
    ),
    "fractional spans": (
        "MptForQuestionAnswering",
        {"start_positions": np.array([0, 1]), "end_positions": np.array([0.5, 1])},
        "end_positions must be integers, positions of tokens",
    ),
    "choice": ("MPNetForMultipleChoice", {"labels": np.array([2])}, "labels must be 0 to 1 .*from 2 to 2"),
    "second head's position": (
        "OpenAIGPTDoubleHeadsModel",
        {"mc_token_ids": np.array([[7, 8]])},
        "mc_token_ids must be 0 to 7, positions of the 8 tokens, got",
    ),
    "second head's label": (
        "OpenAIGPTDoubleHeadsModel",
        {"mc_labels": np.array([2])},
        "mc_labels must be 0 to 1 .*from 2 to 2",
    ),
    "no rows": (
        "OpenAIGPTModel",
        {"input_ids": IDS[:0]},
        "the input has no rows: give at least one sequence",
    ),
}
VALID = {
    "eight bits": {"input_ids": IDS.astype(np.uint8), "attention_mask": _all(1).astype(np.uint8)},
    "sixteen bits": {"input_ids": IDS.astype(np.int16), "position_ids": np.arange(8)[None].astype(np.int16)},
}


def arguments(case: str) -> tuple[str, dict[str, Any]]:
    """The class and all arguments of a case."""
    name, given, _ = INVALID[case]
    return name, {"input_ids": CHOICES if "Double" in name or "Choice" in name else IDS, **given}


# Arguments that `generate` of a GPT Neo with 64 learned positions refuses, and the error message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more tokens than positions": (
        {"max_new_tokens": 58},
        "58 new tokens do not fit: the model has 64 learned positions and the prompt takes 8 of them, so that",
    ),
    "max_length beyond the positions": ({"max_length": 66}, "58 new tokens do not fit"),
    "a pad token": (
        {"pad_token_id": 500, "eos_token_id": 5},
        "filled with the token 500, but .* ids 0 to 88",
    ),
    "a forced token": (
        {"forced_eos_token_id": 89},
        "forced_eos_token_id holds the token 89, but .* ids 0 to 88",
    ),
    "a suppressed token": ({"suppress_tokens": [500]}, "suppress_tokens holds the token 500"),
    "an eos token": ({"eos_token_id": 500}, "eos_token_id holds the token 500"),
    "another tokenizer's prompt": (
        {"input_ids": IDS + 70},
        "input_ids hold the token 95, but .* ids 0 to 88",
    ),
    "no prompts": ({"input_ids": IDS[:0]}, r"input_ids must have the shape \(rows, tokens\), got \(0, 8\)"),
    "a mask of NaN": ({"attention_mask": _all(NAN)}, "attention_mask .* must be 1 .*got NaN"),
    "embeddings of another shape": (
        {"input_ids": None, "inputs_embeds": np.zeros((2, 8), np.float32)},
        r"inputs_embeds must be \(rows, positions, width\), none of them 0, got \(2, 8\)",
    ),
    "too many beams": ({"num_beams": 10**7}, "20000000 rows, more than the 65536 of a call"),
    "too many tokens": (
        {"max_new_tokens": 10**12},
        "max_new_tokens=1000000000000: expected .* at most 2147",
    ),
    "a seed of more than 64 bits": (
        {"do_sample": True, "seed": 10**23},
        "seed must be an integer of 64 bits",
    ),
}
EXTREME_SEEDS = (-1, 2**63, 2**64 - 1)


def refused(case: str) -> dict[str, Any]:
    """All arguments of the `generate` call of a case."""
    given = {"input_ids": IDS, "max_new_tokens": 3, **REFUSED[case][0]}
    if "max_length" in given:
        del given["max_new_tokens"]
    return given
