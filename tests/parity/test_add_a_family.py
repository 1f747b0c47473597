"""The code of docs/add-a-family.md, run as printed: GPT-2 as a seventh family, against transformers."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import PAD, PADDINGS, batch, randomised
from measure import assert_close

from monoblock import families
from monoblock.backends.pytorch import classes

PAGE = Path(__file__).parents[2] / "docs" / "add-a-family.md"
FIELDS: dict[str, Any] = {
    "vocab_size": 89,
    "n_positions": 64,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_inner": 50,
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-3,
    "pad_token_id": PAD,
    "num_labels": 4,
}
CLASSES = ("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def gpt2() -> Iterator[types.ModuleType]:
    """The page's code as a module, for these tests only."""
    module = types.ModuleType("monoblock.families.gpt2")
    sys.modules[module.__name__] = module
    known = dict(families.FAMILIES)
    for code in blocks()[:4]:
        exec(code, module.__dict__)
    yield module
    families.FAMILIES.clear()
    families.FAMILIES.update(known)
    del sys.modules[module.__name__]


def pair(gpt2: Any, name: str, **more: Any) -> tuple[Any, Any]:
    theirs = getattr(transformers, name)(transformers.GPT2Config(**FIELDS, **more))
    randomised(theirs).tie_weights()
    ours = classes.make_class(name)(gpt2.GPT2Config(**FIELDS, **more)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_hidden_states_and_logits_equal_transformers(gpt2: Any, name: str, padding: str) -> None:
    theirs, ours = pair(gpt2, name)
    ids, mask = batch(padding)
    positions = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True, **positions)
    found = ours(ids, attention_mask=mask, output_hidden_states=True)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close("GPT-2 of the page", a, b, 2e-5, mask)
    if "logits" in expected:
        at = None if name == "GPT2ForSequenceClassification" else mask
        assert_close("GPT-2 of the page, logits", found.logits, expected.logits, 2e-5, at)


def test_generation_and_files(gpt2: Any, tmp_path: Path) -> None:
    theirs, ours = pair(gpt2, "GPT2LMHeadModel", bos_token_id=1, eos_token_id=2)
    ids, mask = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    ours.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_options_have_an_effect_or_raise(gpt2: Any) -> None:
    theirs, ours = pair(gpt2, "GPT2Model", scale_attn_weights=False)
    ids, _ = batch("none")
    with torch.no_grad():
        assert_close("unscaled", ours(ids)[0], theirs(ids)[0], 2e-5)
    with pytest.raises(Exception, match="scale_attn_by_inverse_layer_idx=True is not supported"):
        gpt2.GPT2Config(scale_attn_by_inverse_layer_idx=True).to_spec()
    documented = transformers.GPT2Config()
    made = gpt2.GPT2Config()
    for field in gpt2.GPT2Config.fields:
        if hasattr(documented, field):
            assert getattr(made, field) == getattr(documented, field), field


def test_the_family_takes_at_most_140_lines() -> None:
    """Blank lines and docstrings included."""
    assert sum(code.count("\n") for code in blocks()[:3]) < 140
