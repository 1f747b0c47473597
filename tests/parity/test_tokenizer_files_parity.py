"""Tokenizer files against transformers: a folder saved by either library opens in the other."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers_compared import (
    KINDS,
    LINES,
    TEXT,
    both,
    byte_level,
    neox,
    same,
    saved_tokenizer,
    specials,
    transformers,
)

from monoblock.tokenization import AutoTokenizer, GPTNeoXTokenizerFast, PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokenizer(request.param, tmp_path_factory.mktemp(request.param))


def change_settings(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "<p>", "additional_special_tokens": ["<x>", "<y>"]})
    tokenizer.add_tokens(["newword"])
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 11
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def answers(tokenizer: Any) -> Any:
    texts = [*TEXT, "newword <x> <p>"]
    return (
        dict(tokenizer(texts, padding=True)),
        dict(tokenizer(TEXT[0], TEXT[1], truncation=True)),
        specials(tokenizer)[0],
        tokenizer.model_max_length,
        len(tokenizer),
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
        tokenizer.decode(tokenizer.encode("newword <x> fox"), skip_special_tokens=True),
    )


@pytest.mark.parametrize("prepare", ["plain", "bos and eos"])
def test_round_trip_through_both_libraries(folder: Path, tmp_path: Path, prepare: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change_settings(tokenizer)
    if prepare == "bos and eos":
        tokenizer.add_special_tokens({"bos_token": "<b>", "eos_token": "<e>"})
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
    expected = answers(tokenizer)
    paths = tokenizer.save_pretrained(tmp_path / "mine")
    assert all(Path(path).is_file() for path in paths)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert answers(theirs) == expected
    assert theirs.extra_special_tokens == ["<x>", "<y>"]
    assert answers(AutoTokenizer.from_pretrained(tmp_path / "mine")) == expected
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    again.padding_side = "left"
    assert answers(again) == expected
    assert again.extra_special_tokens == ["<x>", "<y>"]


def test_folders_with_a_model_config(folder: Path, tmp_path: Path) -> None:
    """MPT's folders name GPT-NeoX's tokenizer class or none; the ids equal transformers' in both cases."""
    for config in (
        {},
        {"tokenizer_class": "GPTNeoXTokenizerFast"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ):
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt", "vocab_size": 500}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if folder.name.startswith("word") and "PreTrained" not in str(config):
            continue  # transformers would read WordPiece as byte-level BPE
        pair = both(tmp_path)
        same(pair, lambda t: t(TEXT, return_offsets_mapping=True), str(config))
        same(pair, specials, str(config))


@pytest.mark.parametrize("config", [None, {"bos_token": "<s>", "additional_special_tokens": ["<old>"]}])
def test_files_in_older_formats(tmp_path: Path, config: dict[str, Any] | None) -> None:
    byte_level(tmp_path)
    marked = {"content": "<m>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    special = {"eos_token": "<|endoftext|>", "mask_token": marked, "pad_token": "<|padding|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 402, "<m>": 403}))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pair = (
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    same(pair, specials)
    same(pair, lambda t: t("a  <m> b<extra> <old> <s>"))
    same(pair, lambda t: {index: repr(token) for index, token in t.added_tokens_decoder.items()})


def test_vocabulary_files_of_gpt_neox(tmp_path: Path) -> None:
    byte_level(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    )
    for options in ({}, {"add_prefix_space": True}, {"add_bos_token": True}):
        theirs = transformers.GPTNeoXTokenizer(
            vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], **options
        )
        mine = GPTNeoXTokenizerFast.from_pretrained(tmp_path, **options)
        same((mine, theirs), lambda t: t(LINES, padding=True, return_offsets_mapping=True))
        same((mine, theirs), specials)
        same((mine, theirs), lambda t: t.batch_decode(t(TEXT)["input_ids"], skip_special_tokens=True))


def test_ten_thousand_lines(tmp_path: Path) -> None:
    """Ids of 10,000 lines of random characters; decoding returns the normalised strings."""
    config = neox(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pair = both(tmp_path)
    random_ = random.Random(0)
    alphabet = [
        chr(c)
        for block in ((32, 127), (0xA0, 0x250), (0x4E00, 0x4E80), (0x1F600, 0x1F640), (0, 32))
        for c in range(*block)
    ]
    lines = [
        "".join(random_.choices([*alphabet, "  ", " the ", "def "], k=random_.randint(0, 40)))
        for _ in range(10_000)
    ]
    mine, theirs = (tokenizer(lines)["input_ids"] for tokenizer in pair)
    assert mine == theirs
    assert pair[0].batch_decode(mine) == [unicodedata.normalize("NFC", line) for line in lines]
