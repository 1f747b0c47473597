"""Ministral, Mistral with a window in some layers (`layer_types`), against transformers' class of that name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import randomised
from measure import assert_close, rounding
from tiny_families import assert_same_logits, fields, logits_of, model_inputs

import monoblock
from monoblock import DynamicCache
from monoblock.errors import FieldError, UnsupportedConfig

SLIDING, FULL = "sliding_attention", "full_attention"
LAYERS = {
    "alternating": [SLIDING, FULL, SLIDING],
    "one in three": [FULL, SLIDING, SLIDING],
    "all sliding": [SLIDING] * 3,
    "all full": [FULL] * 3,
}
WINDOW = 9  # of the tiny config


def pair(layers: str, ending: str = "ForCausalLM") -> tuple[Any, Any]:
    """The same random model as transformers' class and as ours."""
    given = fields("mistral", layer_types=LAYERS[layers])
    config = transformers.MinistralConfig(**given, attn_implementation="eager")
    theirs = randomised(getattr(transformers, f"Ministral{ending}")(config)).eval()
    ours = getattr(monoblock, f"Mistral{ending}")(monoblock.MistralConfig(**given)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_logits(layers: str) -> None:
    theirs, ours = pair(layers)
    assert ours.spec.windows == tuple(WINDOW if kind == SLIDING else None for kind in LAYERS[layers])
    assert_same_logits(layers, "MistralForCausalLM", theirs, ours)


@pytest.mark.parametrize("ending", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@torch.no_grad()
def test_other_heads(ending: str) -> None:
    theirs, ours = pair("alternating", ending)
    ids, mask = model_inputs("MistralForCausalLM", "right")
    there = theirs(ids, attention_mask=mask, output_hidden_states=True)
    found = ours(ids, attention_mask=mask)
    per_token = mask if ending != "ForSequenceClassification" else None
    assert_close(ending, logits_of(found), logits_of(there), rounding(ours.spec, there), per_token)


@pytest.mark.parametrize("layers", ["alternating", "one in three"])
def test_greedy_tokens_with_every_cache(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens are transformers'; full layers keep the keys that windowed layers drop."""
    monkeypatch.setattr(DynamicCache, "SLACK", 4)
    theirs, ours = pair(layers)
    ids, mask = model_inputs("MistralForCausalLM", "left")
    # Small random models soon repeat one token, which would hide a wrong cache.
    options = {"max_new_tokens": 38, "min_new_tokens": 38, "do_sample": False, "no_repeat_ngram_size": 2}
    expected = theirs.generate(ids, attention_mask=mask, **options)
    assert ours.decoding_path().startswith("native step")
    out = ours.generate(ids, attention_mask=mask, **options, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    cache = out.past_key_values
    for i, kind in enumerate(LAYERS[layers]):
        assert cache.get_seq_length(i) == expected.shape[1] - 1
        assert (cache.held(i) < cache.get_seq_length(i)) == (kind == SLIDING), f"layer {i}"
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(ours.generate(ids, attention_mask=mask, **options, **how), expected), how


@torch.no_grad()
def test_round_trip_through_files(tmp_path: Path) -> None:
    theirs, ours = pair("alternating")
    ids, _ = model_inputs("MistralForCausalLM", "none")
    there = theirs(ids, output_hidden_states=True)
    bound = rounding(ours.spec, there)

    theirs.save_pretrained(tmp_path / "theirs")
    for cls in (monoblock.AutoModelForCausalLM, monoblock.MistralForCausalLM):
        read = cls.from_pretrained(tmp_path / "theirs")
        assert_close("theirs", read(ids).logits, there.logits, bound)

    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == "ministral"
    assert written["architectures"] == ["MinistralForCausalLM"]
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(read) is transformers.MinistralForCausalLM
    assert_close("ours", read.eval()(ids).logits, there.logits, bound)
    again = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close("ours, read here", again(ids).logits, there.logits, bound)


@pytest.mark.parametrize(
    ("layers", "window", "stored"),
    [("all sliding", WINDOW, "Mistral"), ("all full", None, "Mistral"), ("all full", WINDOW, "Ministral")],
)
def test_layer_types_that_mistral_has_too_keep_its_model_type(
    layers: str, window: int | None, stored: str, tmp_path: Path
) -> None:
    """transformers' Mistral ignores layer_types: every layer has the window, if there is one."""
    given = fields("mistral", layer_types=LAYERS[layers], sliding_window=window)
    monoblock.MistralForCausalLM(monoblock.MistralConfig(**given)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == (stored.lower(), [f"{stored}ForCausalLM"])


def test_layer_types_of_a_mistral_config(tmp_path: Path) -> None:
    """Some Ministral checkpoints have the model_type "mistral"; transformers warns and ignores their layer_types."""
    content = {"model_type": "mistral", **fields("mistral", layer_types=LAYERS["alternating"])}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert monoblock.AutoConfig.from_pretrained(tmp_path).to_spec().windows == (WINDOW, None, WINDOW)


def test_transformers_config_objects_are_accepted() -> None:
    config = transformers.MinistralConfig(**fields("mistral", layer_types=LAYERS["alternating"]))
    assert monoblock.MistralForCausalLM(config).spec.windows == (WINDOW, None, WINDOW)
    assert monoblock.AutoModel.from_config(config).spec.windows == (WINDOW, None, WINDOW)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_types": [SLIDING, FULL]}, "for each of the 3 layers of num_hidden_layers, got 2"),
        (
            {"layer_types": [FULL, FULL, "chunked_attention"]},
            "must name 'sliding_attention' or 'full_attention'",
        ),
        ({"layer_types": [FULL, SLIDING, FULL], "sliding_window": None}, "needs a sliding_window, got None"),
        ({"layer_types": SLIDING}, "layer_types must be a list of strings or None, got 'sliding_attention'"),
    ],
)
def test_invalid_layer_types_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        monoblock.MistralConfig(**fields("mistral", **given)).to_spec()


def test_rope_parameters_by_layer_type() -> None:
    """Equal parameters for both layer types are one RoPE; different ones raise."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    same = monoblock.MistralConfig(rope_parameters={FULL: rope, SLIDING: rope})
    assert same.to_spec() == monoblock.MistralConfig(rope_parameters=rope).to_spec()
    with pytest.raises(UnsupportedConfig, match="differ between full_attention and sliding_attention"):
        monoblock.MistralConfig(rope_parameters={FULL: rope, SLIDING: {**rope, "rope_theta": 1e4}})
