"""Options that tokenizer_config.json and tokenizer.json, or two names, say differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from trained_tokenizers import backend

from monoblock import AutoTokenizer

SPECIAL = [("<s>", 0), ("</s>", 1)]
WRITES = {"": "$A", "bos": "<s> $A", "both": "<s> $A </s>"}


def folder(path: Path, template: str, **options: Any) -> Path:
    made = backend()
    made.post_processor = processors.TemplateProcessing(single=WRITES[template], special_tokens=SPECIAL)
    made.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps({**names, **options}))
    return path


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        ("bos", {}, (True, False)),
        ("both", {}, (True, True)),
        ("bos", {"add_eos_token": True}, (True, True)),
        ("", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("bos", {"add_bos_token": False}, (False, False)),
        ("both", {"add_bos_token": False}, (False, True)),
    ],
)
def test_the_option_wins_for_llamas_class(
    tmp_path: Path, template: str, options: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    made = AutoTokenizer.from_pretrained(
        folder(tmp_path, template, tokenizer_class="LlamaTokenizer", **options)
    )
    ids = made("the fox")["input_ids"]
    assert (ids[0] == 0, ids[-1] == 1) == expected


def test_both_names_of_the_extra_tokens_act(tmp_path: Path) -> None:
    place = folder(tmp_path, "", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=[])
    made = AutoTokenizer.from_pretrained(place, additional_special_tokens=["<x>"])
    assert made.extra_special_tokens == ["<x>"]
