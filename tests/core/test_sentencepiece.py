"""SentencePiece models encoded by hand, compared with a direct implementation of SentencePiece's BPE."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from mixed_text import mixed_lines
from protobuf_writer import field, varint

from monoblock import AutoTokenizer, CheckpointError, HubError, LlamaTokenizer, UnsupportedConfig
from monoblock.tokenization.protobuf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_model

Piece = tuple[str, float, int]
BPE, UNIGRAM, CHAR = 2, 1, 4


def message(pieces: list[Piece], kind: int = BPE, normalizer: bytes = b"", trainer: bytes = b"") -> bytes:
    """A serialised model: pieces, and an identity normaliser with a dummy prefix."""
    rows = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + (field(3, type_) if type_ != NORMAL else b""))
        for text, score, type_ in pieces
    )
    fallback = field(35, 1) if any(type_ == BYTE for *_, type_ in pieces) else b""
    return rows + field(2, field(3, kind) + fallback + trainer) + field(3, field(4, 0) + normalizer)


HEAD: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES: list[Piece] = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]


def train_bpe(lines: list[str], count: int) -> list[str]:
    """Pieces of BPE training: merges the most frequent pair `count` times."""
    rows = [list("▁" + line.replace(" ", "▁")) for line in lines]
    pieces: list[str] = []
    for _ in range(count):
        pairs: dict[str, int] = {}
        for row in rows:
            for left, right in itertools.pairwise(row):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append(best)
        rows = [joined(row, best) for row in rows]
    return pieces


def joined(row: list[str], piece: str) -> list[str]:
    out: list[str] = []
    for token in row:
        if out and out[-1] + token == piece:
            out[-1] = piece
        else:
            out.append(token)
    return out


def vocabulary(fallback: bool = True) -> list[Piece]:
    # Some characters are in no piece.
    lines = [
        line for line in mixed_lines(300, seed=1) if line.isprintable() and not set(line) & set("好文🎉")
    ]
    merged = list(dict.fromkeys(["▁a", *train_bpe(lines, 250), "aa", "aaa", "aaaa"]))
    letters = sorted(set("▁" + "".join(lines).replace(" ", "▁")))
    ranked = [*merged, *letters]
    spaces = [("▁" * n, -1e9, NORMAL) for n in range(2, 9) if "▁" * n not in ranked and n != 7]
    scored = [(text, -1e9 if set(text) == {"▁"} else -float(i), NORMAL) for i, text in enumerate(ranked)]
    return [*HEAD, *(BYTES if fallback else []), *scored, *spaces]


def reference_bpe(text: str, pieces: list[Piece]) -> list[int]:
    """SentencePiece's BPE: repeatedly merges the pair with the best score, the leftmost of equal ones."""
    ids = {text: index for index, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    tokens = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-scores[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(tokens)) if a + b in scores
        ]
        if not pairs:
            break
        _, at = min(pairs)
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
    out: list[int] = []
    for token in tokens:
        if token in scores:
            out.append(ids[token])
        elif "<0x00>" in ids:
            out += [ids[f"<0x{byte:02X}>"] for byte in token.encode()]
        elif not out or out[-1] != 0:
            out.append(0)  # consecutive unknown characters are one token
    return out


def model(folder: Path, data: bytes) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("fallback", [True, False])
def test_bpe_equals_the_reference(tmp_path: Path, fallback: bool) -> None:
    pieces = vocabulary(fallback)
    tokenizer = LlamaTokenizer.from_pretrained(model(tmp_path, message(pieces)))
    rng = random.Random(0)
    runs = ["".join(rng.choices(" a", k=rng.randint(1, 40))) for _ in range(100)]
    lines = [*mixed_lines(400, seed=2), *runs, "", " ", "  a", "▁", "▁▁a", "<s>", "<0x0A>", "\n\n"]
    ids = tokenizer(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for line, row in zip(lines, ids, strict=True):
        assert row == reference_bpe(line, pieces), repr(line)
        if fallback and "▁" not in line:
            assert tokenizer.decode(row) == line


def test_special_tokens_and_the_dummy_prefix(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer(model(tmp_path, message([*vocabulary(), ("[T]", 0.0, CONTROL)])))
    tokens = tokenizer.tokenize
    assert tokens("a") == tokens("a</s>")[:1] == ["▁a"] and tokens(" a") == ["▁", "▁a"]
    # After a special token no space is added or removed.
    assert tokens("[T]a") == ["[T]", "a"] and tokens("[T] a") == ["[T]", "▁a"]
    assert tokens("</s>  a") == ["</s>", "▁", "▁a"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1 and tokenizer.padding_side == "left"
    assert tokenizer("a", "a").tokens() == ["<s>", "▁a", "<s>", "▁a"]
    # Likewise for tokens that are added later, and for one with other flags in tokenizer_config.json.
    tokenizer.add_special_tokens({"pad_token": "<later>"})
    tokenizer.add_tokens("[more]")
    assert tokens("<later> a") == ["<later>", "▁a"] and tokens("[more] a") == ["[more]", "▁a"]
    config = {"3": {"content": "<later>", "normalized": False, "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": config}))
    again = LlamaTokenizer.from_pretrained(tmp_path)
    assert again.tokenize("<later> a") == ["<later>", "▁a"] and again.tokenize(" a") == ["▁", "▁a"]


def test_prefix_and_legacy(tmp_path: Path) -> None:
    path = model(tmp_path, message(vocabulary()))
    plain = LlamaTokenizer.from_pretrained(path, add_prefix_space=False)
    assert plain.tokenize("a a") == ["a", "▁a"] and plain.decode(plain.encode("a a"), True) == "a a"
    legacy = LlamaTokenizer.from_pretrained(path, legacy=True)
    assert legacy.tokenize("a</s>a") == ["▁a", "</s>", "▁a"] and legacy.tokenize(" a") == ["▁", "▁a"]
    ends = LlamaTokenizer.from_pretrained(path, add_bos_token=False, add_eos_token=True)
    assert ends("a").tokens() == ["▁a", "</s>"]
    for tokenizer in (plain, legacy, ends):
        tokenizer.save_pretrained(tmp_path / "saved")
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert again("a</s> a")["input_ids"] == tokenizer("a</s> a")["input_ids"]
    LlamaTokenizer.from_pretrained(path).save_pretrained(tmp_path / "saved")
    changed = LlamaTokenizer.from_pretrained(tmp_path / "saved", add_prefix_space=False)
    assert changed.tokenize("a a") == ["a", "▁a"]


def test_user_defined_pieces_are_matched_first(tmp_path: Path) -> None:
    pieces = [*vocabulary(), ("[X]", 0.0, USER_DEFINED), ("a[X", 0.0, USER_DEFINED)]
    tokenizer = LlamaTokenizer.from_pretrained(model(tmp_path, message(pieces)))
    plain = {"split_special_tokens": True}
    assert tokenizer.tokenize("[X]a", **plain) == ["▁", "[X]", "a"]
    assert tokenizer.tokenize("ba[X]</s>", **plain)[-4:] != ["[X]", "</s>"]
    assert tokenizer.tokenize("ba[X]b", **plain) == ["▁", "b", "a[X", "]", "b"]
    assert tokenizer.tokenize("[X]</s>", **plain) == ["▁", "[X]", "<", "/", "s", ">"]


def test_unigram_finds_the_most_probable_segmentation(tmp_path: Path) -> None:
    words = [("▁", -3.0, NORMAL), ("a", -2.0, NORMAL), ("b", -2.5, NORMAL), ("▁ab", -4.0, NORMAL)]
    more = [("ba", -2.6, NORMAL), ("<", -5.0, NORMAL), ("s", -5.0, NORMAL), (">", -5.0, NORMAL)]
    pieces = [*HEAD, *BYTES, *words, *more]
    tokenizer = AutoTokenizer.from_pretrained(model(tmp_path, message(pieces, UNIGRAM)))
    assert tokenizer.tokenize("ab aba") == ["▁ab", "▁ab", "a"]
    assert tokenizer.tokenize("bba") == ["▁", "b", "ba"]
    assert tokenizer.tokenize("aé") == ["▁", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.tokenize("<s>", split_special_tokens=True) == ["▁", "<", "s", ">"]
    assert tokenizer.tokenize("a<0x0A>", split_special_tokens=True)[-1] == ">"
    assert tokenizer.decode(tokenizer.encode("ab é"), skip_special_tokens=True) == "ab é"


def test_construction_from_a_vocabulary_in_memory() -> None:
    ids = {
        text: index
        for index, (text, _, _) in enumerate([*HEAD, *BYTES, ("▁", 0, 1), ("a", 0, 1), ("▁a", 0, 1)])
    }
    tokenizer = LlamaTokenizer(vocab=ids, merges=["▁ a"])
    assert tokenizer("a a").tokens() == ["<s>", "▁a", "▁a"]
    scored = [(text, score) for text, score, _ in [*HEAD, ("▁", -1.0, 1), ("a", -1.0, 1)]]
    assert LlamaTokenizer(vocab=scored)("aa").tokens() == ["<s>", "▁", "a", "a"]


def test_missing_special_tokens_are_none(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, UNKNOWN), ("▁a", -1.0, NORMAL), ("▁", -2.0, NORMAL), ("a", -3.0, NORMAL)]
    tokenizer = LlamaTokenizer.from_pretrained(model(tmp_path, message(pieces)))
    assert len(tokenizer) == 4 and tokenizer.bos_token is None and tokenizer("a")["input_ids"] == [1]


def test_space_options_of_the_normaliser(tmp_path: Path) -> None:
    pieces = [*HEAD, ("▁a", -1.0, NORMAL), ("▁", -2.0, NORMAL), ("a", -3.0, NORMAL)]
    strip = LlamaTokenizer.from_pretrained(model(tmp_path, message(pieces, normalizer=field(4, 1))))
    assert strip.tokenize("  a   a ") == ["▁a", "▁a"] and strip.tokenize("   ") == []
    bare = LlamaTokenizer.from_pretrained(model(tmp_path, message(pieces, normalizer=field(3, 0))))
    assert bare.tokenize("a a") == ["a", "▁a"]


def test_save_vocabulary_copies_the_file(tmp_path: Path) -> None:
    path = model(tmp_path, message(vocabulary()))
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    (copy,) = tokenizer.save_vocabulary(tmp_path / "copy", filename_prefix="a")
    assert Path(copy).name == "a-tokenizer.model" and Path(copy).read_bytes() == path.read_bytes()
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = LlamaTokenizer.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"not read from a tokenizer\.model"):
        saved.save_vocabulary(tmp_path / "none")
    path.unlink()
    with pytest.raises(ValueError, match="no longer exists"):
        tokenizer.save_vocabulary(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_fields_in_any_order_and_unknown_ones(tmp_path: Path) -> None:
    odd = field(3, CONTROL) + field(2, -1.5) + field(9, b"later") + field(10, 7) + field(1, b"x" * 200)
    model(tmp_path, field(7, 3) + field(1, odd) + field(2, field(40, -1)) + field(1, field(1, b"y")))
    read = read_model(tmp_path / "tokenizer.model")
    assert read.pieces == ["x" * 200, "y"] and read.scores == [-1.5, 0.0] and read.types == [CONTROL, NORMAL]
    assert read.unk_id == -1 and read.kind == "unigram" and read.dummy_prefix and read.strip


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "has no vocabulary"),
        (message(vocabulary())[:-7], "ends . bytes too early"),
        (message(vocabulary())[:4000], "too early"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4\n", "not a SentencePiece model"),
        (b"<!DOCTYPE html><html></html>", "not a SentencePiece model"),
        (b"\xff" * 50, "a number has no end"),
        (field(1, field(1, b"\xff\xfe")), "not a SentencePiece model"),
        (field(1, field(1, 5)), "fields of the wrong type"),
        (field(1, field(1, b"a") + field(2, b"abc")), "not a SentencePiece model"),
        # Lengths that are negative as signed integers (once an endless loop), or beyond the end of the file.
        (varint(1 << 3 | 2) + varint(-11) + bytes(12), "bytes too early"),
        (varint(9 << 3 | 2) + varint(-23) + bytes(12), "bytes too early"),
        (varint(1 << 3 | 2) + varint(2**40) + bytes(12), "bytes too early"),
        (varint(1 << 3 | 3) + bytes(30), "no field of wire type 3"),
        (message([*vocabulary(), ("q" * 600, 0.0, NORMAL)]), "a piece has 600 characters"),
        # Tables on which the tokenizers library panics.
        (
            message(vocabulary(), normalizer=field(2, b"\x10\0\0\0" + b"\xff" * 16 + b"abc")),
            "its trie has no root",
        ),
        (
            message(vocabulary(), normalizer=field(2, b"\x10\0\0\0" + b"\1\2\3\4" * 4 + b"abc")),
            "has an index out of range",
        ),
        (message(vocabulary(), normalizer=field(2, b"\x10")), "it is truncated"),
    ],
)
def test_corrupt_files(tmp_path: Path, data: bytes, expected: str) -> None:
    model(tmp_path, data)
    with pytest.raises(CheckpointError, match=expected):
        LlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (message(vocabulary(), CHAR), "model type is 'char'"),
        (message(vocabulary(), trainer=field(24, 1)), "treat_whitespace_as_suffix"),
        (message(vocabulary(), normalizer=field(5, 0)), "escape_whitespaces"),
        (message([*vocabulary(), ("q", 0.0, UNUSED)]), "unused pieces, such as 'q'"),
        (message(vocabulary()) + field(5, field(2, b"table")), "denormalizer_spec"),
        (message(HEAD[1:], trainer=field(40, 7)), "unk_id"),
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    model(tmp_path, data)
    with pytest.raises(UnsupportedConfig, match=expected):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_missing_files_and_vocabularies(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="does not exist"):
        LlamaTokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(HubError, match=r"nor tekken\.json"):
        LlamaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a vocabulary"):
        LlamaTokenizer(merges=["a b"])
