"""Tekken vocabularies written by the tests, compared with a direct implementation of byte-level BPE by rank."""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mixed_text import mixed_lines

from monoblock import AutoTokenizer, CheckpointError, LlamaTokenizer
from monoblock.tokenization.tekken import byte_letters

PATTERN = r"[A-Za-z]+| ?[^ \nA-Za-z]+|[ \n]+"  # character classes with the same meaning in all regex engines
SPECIAL_COUNT = 30


def ranked(count: int = 300) -> list[bytes]:
    """All bytes, the most frequent pairs of BPE training, and tokens of repeated characters."""
    text = "".join(mixed_lines(60, seed=1))
    rows = [[bytes([byte]) for byte in word.encode()] for word in re.findall(PATTERN, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(count):
        pairs: dict[bytes, int] = {}
        for row in rows:
            for left, right in itertools.pairwise(row):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        tokens.append(max(sorted(pairs), key=lambda pair: pairs[pair]))
        rows = [joined(row, tokens) for row in rows]
    return list(dict.fromkeys([*tokens, b"aaa", b"aa", b"aaaaa", b"    ", b"  ", b"   "]))


def joined(row: list[bytes], tokens: list[bytes]) -> list[bytes]:
    out: list[bytes] = []
    for token in row:
        if out and out[-1] + token == tokens[-1]:
            out[-1] += token
        else:
            out.append(token)
    return out


def reference_bpe(text: str, tokens: list[bytes]) -> list[int]:
    """Words that are tokens; for others, repeatedly merges the pair of the lowest rank, the leftmost first."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids: list[int] = []
    for word in re.findall(PATTERN, text):
        symbols = [bytes([byte]) for byte in word.encode()]
        symbols = [word.encode()] if word.encode() in ranks else symbols
        while pairs := [
            (ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ranks
        ]:
            _, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        ids += [SPECIAL_COUNT + ranks[symbol] for symbol in symbols]
    return ids


TOKENS = ranked()


def content(**config: Any) -> dict[str, Any]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate([*TOKENS, b"not used"])
    ]
    sizes = {"default_vocab_size": SPECIAL_COUNT + len(TOKENS), "default_num_special_tokens": SPECIAL_COUNT}
    return {"config": {"pattern": PATTERN, "version": "v3", **sizes, **config}, "vocab": vocab}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tekken.json").write_text(json.dumps(content()), encoding="utf-8")
    return tmp_path


def test_ids_equal_the_reference_and_decode_to_the_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is LlamaTokenizer and len(tokenizer) == SPECIAL_COUNT + len(TOKENS)
    lines = [*mixed_lines(300, seed=4), *("a" * n for n in range(1, 20)), *(" " * n for n in range(20)), ""]
    rows = tokenizer(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for line, row in zip(lines, rows, strict=True):
        assert row == reference_bpe(line, TOKENS), repr(line)
    assert tokenizer.batch_decode(rows) == lines


def test_incomplete_characters_decode_to_replacement_characters(folder: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(folder / "tekken.json")
    ids = [SPECIAL_COUNT + byte for byte in "é".encode()]
    assert tokenizer.decode(ids) == "é" and tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode([1, *ids, 2]) == "<s>é</s>"
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == "é"


def test_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("[INST]</s>")["input_ids"] == [1, 3, 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (11, 0, 2)
    assert tokenizer.convert_ids_to_tokens(29) == "<SPECIAL_29>" and 29 in tokenizer.added_tokens_decoder
    listed = [{"rank": 1, "token_str": "<s>"}, {"rank": 0, "token_str": "<zero>"}]
    (folder / "tekken.json").write_text(json.dumps({**content(), "special_tokens": listed}))
    other = AutoTokenizer.from_pretrained(folder)
    assert other("<zero>x<SPECIAL_2>")["input_ids"][:2] == [1, 0]
    assert other.eos_token is None and other.pad_token is None and other.bos_token_id == 1


def test_the_chat_template_has_no_spaces(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes "},
        {"role": "user", "content": "And?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<s>[INST]Hi[/INST]Yes</s>[INST]And?[/INST]"
    (folder / "tekken.json").write_text(json.dumps(content(version="v13")))
    with pytest.raises(ValueError, match="no chat template"):
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat)


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    (copy,) = tokenizer.save_vocabulary(tmp_path / "saved")
    assert Path(copy).read_bytes() == (folder / "tekken.json").read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    lines = mixed_lines(50, seed=5)
    assert again(lines)["input_ids"] == tokenizer(lines)["input_ids"]
    assert again.chat_template == tokenizer.chat_template and again.pad_token == "<pad>"


def test_every_byte_has_a_letter() -> None:
    from tokenizers import pre_tokenizers

    letters = byte_letters()
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert letters[ord("a")] == "a" and letters[ord(" ")] == "Ġ" and letters[ord("\n")] == "Ċ"


WHOLE = json.dumps(content())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        (WHOLE[: len(WHOLE) // 2], "is damaged"),
        ("[]", "not a Tekken vocabulary"),
        (json.dumps({"vocab": []}), "its config has no default_num_special_tokens"),
        (json.dumps({**content(), "vocab": content()["vocab"][:100]}), "it has 100 tokens of the"),
        (json.dumps({**content(), "vocab": [content()["vocab"][0]] * 999}), "ranks are missing"),
        (json.dumps(content(default_vocab_size="many")), "is damaged"),
        (json.dumps(content(default_num_special_tokens=5)), "lists 20 special tokens and has room for 5"),
        (json.dumps(content(default_num_special_tokens=2**31)), "expected at most 65,536"),
        (json.dumps(content(default_num_special_tokens=-1)), "it has -1 special tokens"),
        (json.dumps(content(default_vocab_size=2**40)), "tokens of the 1099511627746"),
        (json.dumps(content(pattern="(")), "is damaged"),
        (json.dumps({**content(), "special_tokens": [{"rank": 3, "token_str": "<s>"}]}), "have gaps"),
        (
            json.dumps({**content(), "special_tokens": [{"rank": 0, "token_str": "a"}]}),
            "'a' is both a special token and",
        ),
        (WHOLE.replace('"token_bytes": "AA=="', '"token_bytes": "A"', 1), "is damaged"),
    ],
)
def test_corrupt_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tekken.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)
