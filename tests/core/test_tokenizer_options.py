"""Tokenizer options that differ between tokenizer_config.json and tokenizer.json, or have two names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from trained_tokenizers import backend

from monoblock import AutoTokenizer

SPECIAL = [("<s>", 0), ("</s>", 1)]
TEMPLATES = {"": "$A", "bos": "<s> $A", "both": "<s> $A </s>"}


def folder(path: Path, template: str, **options: Any) -> Path:
    saved = backend()
    saved.post_processor = processors.TemplateProcessing(single=TEMPLATES[template], special_tokens=SPECIAL)
    saved.save(str(path / "tokenizer.json"))
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
def test_options_override_the_post_processor_of_llama_tokenizer(
    tmp_path: Path, template: str, options: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        folder(tmp_path, template, tokenizer_class="LlamaTokenizer", **options)
    )
    ids = tokenizer("the fox")["input_ids"]
    assert (ids[0] == 0, ids[-1] == 1) == expected


def test_both_names_of_extra_special_tokens(tmp_path: Path) -> None:
    path = folder(tmp_path, "", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=[])
    tokenizer = AutoTokenizer.from_pretrained(path, additional_special_tokens=["<x>"])
    assert tokenizer.extra_special_tokens == ["<x>"]
