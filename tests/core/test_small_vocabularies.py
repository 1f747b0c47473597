"""The families' tokenizer classes with small vocabularies: class selection, options, saving, invalid files."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
import types
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import monoblock
from monoblock import (
    AutoTokenizer,
    CheckpointError,
    GPT2Tokenizer,
    HubError,
    MPNetTokenizer,
    OpenAIGPTTokenizer,
)
from monoblock.tokenization import openai_gpt

GPT1_MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o</w>",
    "d o",
    "do g</w>",
    "c a",
    "ca f",
    "caf é</w>",
    "caf e</w>",
]


def gpt1(folder: Path, merges: list[str] = GPT1_MERGES) -> Path:
    letters = [*"abcdefghilo,.!-é", *(f"{letter}</w>" for letter in "abcdefghilo,.!-é\n")]
    tokens = ["<unk>", *letters, *(merge.replace(" ", "") for merge in GPT1_MERGES)]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "openai-gpt"}')
    return folder


def gpt2(folder: Path) -> Path:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "hello", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o\n")
    (folder / "config.json").write_text('{"model_type": "gpt_neo"}')
    return folder


PIECES = ["[PAD]", "[UNK]", "[CLS]", "the", "dog", "##s", "cafe", "A", "!"]


def mpnet(folder: Path) -> Path:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "<mask>"]
    (folder / "vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "mpnet"}')
    return folder


class Word:
    def __init__(self, text: str):
        self.text = text


class English:
    """The subset of spaCy's tokenizer that the tests need: words, punctuation, line breaks with a following space."""

    def tokenizer(self, text: str) -> Iterator[Word]:
        return (Word(found) for found in re.findall(r"\n ?|\w+|[^\w\s]", text))


@pytest.fixture
def spacy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs minimal replacements of spaCy and ftfy."""
    modules = {"spacy": {}, "spacy.lang": {}, "spacy.lang.en": {"English": English}}
    modules["ftfy"] = {"fix_text": lambda text: text.replace("â€™", "'")}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    openai_gpt._packages.cache_clear()
    openai_gpt._log_choice.cache_clear()
    yield
    openai_gpt._packages.cache_clear()
    openai_gpt._log_choice.cache_clear()


# --- GPT-1


def test_gpt1_with_the_bert_pre_tokenizer(tmp_path: Path) -> None:
    tokenizer = OpenAIGPTTokenizer.from_pretrained(gpt1(tmp_path), original=False)
    assert tokenizer.tokenize("Hello, DOG\ncafé!") == ["hello</w>", ",</w>", "dog</w>", "cafe</w>", "!</w>"]
    ids = tokenizer("Hello, dog!")["input_ids"]
    assert tokenizer.decode(ids) == "hello , dog !"
    assert tokenizer.tokenize("x") == ["<unk>"] and tokenizer.do_lower_case and not tokenizer.original
    assert tokenizer("Hello", return_offsets_mapping=True)["offset_mapping"] == [(0, 5)]


def test_gpt1_with_the_original_pre_tokenizer(
    tmp_path: Path, spacy: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "monoblock"):
        tokenizers = [AutoTokenizer.from_pretrained(gpt1(tmp_path)) for _ in range(3)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "as in the paper" in messages[0] and "original=True" in messages[0]
    tokenizer = tokenizers[0]
    assert tokenizer.original
    # Accents and line breaks are kept; punctuation is standardised.
    tokens = ["café</w>", "\n</w>", "hello</w>", "-</w>", "dog</w>", "!</w>"]
    assert tokenizer.tokenize("Café \n\n  HELLO\u2014dog!") == tokens
    assert tokenizer.decode(tokenizer.encode("café\nhello")) == "café \n hello"
    # Special tokens are matched first; pairs, batches, padding and splitting work.
    tokenizer.add_special_tokens({"pad_token": "<pad>", "cls_token": "[CLS]"})
    assert tokenizer.tokenize("dog[CLS]") == ["dog</w>", "[CLS]"]
    assert "[CLS]" not in tokenizer.tokenize("dog[CLS]", split_special_tokens=True)
    batch = tokenizer([("dog", "hello dog"), ("dog", "dog")], padding=True)
    assert [len(row) for row in batch["input_ids"]] == [3, 3] and batch["attention_mask"][1] == [1, 1, 0]
    assert tokenizer(["dog", "Hello dog"], is_split_into_words=True).tokens() == [
        "dog</w>",
        "hello</w>",
        "dog</w>",
    ]
    with pytest.raises(ValueError, match="original=False"):
        tokenizer("dog", return_offsets_mapping=True)
    # The saved backend does not depend on `original`.
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.tokenize("café") == ["café</w>"]
    tokenizer.save_pretrained(tmp_path / "saved")
    other = OpenAIGPTTokenizer.from_pretrained(tmp_path / "saved", original=False)
    assert other.tokenize("café\nhello") == ["cafe</w>", "hello</w>"]


def test_gpt1_text_standardisation() -> None:
    assert openai_gpt.standardized(
        " a\u2026b\u00b4\u2013--c  d \n\n\te?!"
    ) == "a...b' --- c d \n e ?  !".replace("  ", " ")


def test_original_is_saved_and_not_logged_if_given(
    tmp_path: Path, spacy: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "monoblock"):
        tokenizer = OpenAIGPTTokenizer.from_pretrained(gpt1(tmp_path), original=False)
        tokenizer.save_pretrained(tmp_path / "saved")
        assert not AutoTokenizer.from_pretrained(tmp_path / "saved").original
    assert not caplog.records


def test_missing_spacy_or_ftfy_raises_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    openai_gpt._packages.cache_clear()
    with pytest.raises(ImportError, match="pip install ftfy spacy"):
        OpenAIGPTTokenizer.from_pretrained(gpt1(tmp_path), original=True)


def test_gpt1_text_is_fixed_by_ftfy(tmp_path: Path, spacy: None) -> None:
    assert OpenAIGPTTokenizer.from_pretrained(gpt1(tmp_path)).tokenize("â€™") == ["<unk>"]


# --- documented signatures and examples


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("OpenAIGPTTokenizer", {"vocab_file": None, "merges_file": None}),
        (
            "OpenAIGPTTokenizerFast",
            {"vocab_file": None, "merges_file": None, "tokenizer_file": None, "unk_token": "<unk>"},
        ),
        ("GPT2TokenizerFast", {"vocab_file": None, "merges_file": None, "tokenizer_file": None}),
        ("LlamaTokenizerFast", {"vocab_file": None, "tokenizer_file": None}),
        ("MPNetTokenizerFast", {"vocab_file": None, "tokenizer_file": None}),
    ],
)
def test_signatures(name: str, start: dict[str, Any]) -> None:
    cls = getattr(monoblock, name)
    parameters = {key: value.default for key, value in signature(cls).parameters.items()}
    assert list(parameters.items())[: len(start)] == list(start.items())
    assert "**kwargs" in str(signature(cls))
    assert list(signature(cls.save_vocabulary).parameters) == ["self", "save_directory", "filename_prefix"]
    assert getattr(monoblock, name.removesuffix("Fast")) is cls


def test_files_as_positional_arguments(tmp_path: Path) -> None:
    folder = gpt1(tmp_path)
    files = [str(folder / "vocab.json"), str(folder / "merges.txt")]
    first = OpenAIGPTTokenizer(*files, original=False)
    names = first.save_vocabulary(str(tmp_path / "out"), "x")
    assert [Path(name).name for name in names] == ["x-vocab.json", "x-merges.txt"]
    assert OpenAIGPTTokenizer(*names, original=False).get_vocab() == first.get_vocab()
    first.save_pretrained(tmp_path / "saved")
    file = str(tmp_path / "saved/tokenizer.json")
    third = OpenAIGPTTokenizer(None, None, file, "<unk>", original=False)
    assert third("hello")["input_ids"] == first("hello")["input_ids"]


def test_double_heads_example(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt1(tmp_path), original=False)
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"cls_token": "[CLS]"}) == 1
    assert tokenizer.cls_token_id == size == len(tokenizer) - 1
    choices = ["Hello, my dog is cute [CLS]", "Hello, mi dog is cute [CLS]"]
    assert all(tokenizer.encode(choice)[-1] == size for choice in choices)
    rows = tokenizer(choices, return_tensors="np", padding=False)["input_ids"]
    assert rows.shape[0] == 2


# --- GPT-2 and MPNet


def test_gpt2(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2(tmp_path))
    assert type(tokenizer) is GPT2Tokenizer and tokenizer.pad_token is None
    assert tokenizer.tokenize("hello héll") == ["hello", "Ġ", "h", "Ã", "©", "ll"]
    text = "  hello\n\tworld \x00 🎉"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    spaced = GPT2Tokenizer.from_pretrained(tmp_path, add_prefix_space=True, add_bos_token=True)
    assert spaced("hello").tokens() == ["<|endoftext|>", "Ġ", "hello"]
    with pytest.raises(ValueError, match="errors='strict' is not supported"):
        GPT2Tokenizer.from_pretrained(tmp_path, errors="strict")


@pytest.mark.parametrize("name", ["vocab.txt", "dict.txt"])
def test_mpnet(tmp_path: Path, name: str) -> None:
    mpnet(tmp_path)
    if name == "dict.txt":
        (tmp_path / "vocab.txt").unlink()
        (tmp_path / name).write_text("".join(f"{token} {i}\n" for i, token in enumerate(PIECES)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is MPNetTokenizer and tokenizer.vocab_size == len(PIECES) + 5
    assert tokenizer("The dogs").tokens() == ["<s>", "the", "dog", "##s", "</s>"]
    pair = tokenizer("dog", "café x", return_token_type_ids=True)
    assert pair.tokens() == ["<s>", "dog", "</s>", "</s>", "cafe", "[UNK]", "</s>"]
    assert set(pair["token_type_ids"]) == {0}
    ids = tokenizer.encode("the <mask>!", add_special_tokens=False)  # lstrip of the mask token
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "<mask>", "!"]
    assert tokenizer.decode(tokenizer.encode("the dogs"), skip_special_tokens=True) == "the dogs"
    cased = MPNetTokenizer.from_pretrained(tmp_path, do_lower_case=False)
    assert cased.tokenize("A The") == ["A", "[UNK]"]
    tokenizer.save_pretrained(tmp_path / "saved")
    cased = AutoTokenizer.from_pretrained(tmp_path / "saved", do_lower_case=False)
    assert type(cased) is MPNetTokenizer and cased.tokenize("A The") == ["A", "[UNK]"]
    (written,) = tokenizer.save_vocabulary(tmp_path / "saved")
    assert MPNetTokenizer(written).get_vocab() == tokenizer.get_vocab()


# --- class selection


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mistral", "LlamaTokenizer"),
        ("fuyu", "LlamaTokenizer"),
        ("persimmon", "LlamaTokenizer"),
        ("openai-gpt", "OpenAIGPTTokenizer"),
        ("gpt_neo", "GPT2Tokenizer"),
        ("mpnet", "MPNetTokenizer"),
        ("mpt", "GPTNeoXTokenizerFast"),
    ],
)
def test_class_by_model_type(tmp_path: Path, model_type: str, name: str) -> None:
    from monoblock.tokenization.classes import by_model_type, by_name

    chosen = by_model_type(model_type)
    assert chosen is getattr(monoblock, name) and by_name(name) is by_name(chosen.family.names[0]) is chosen
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(HubError, match=r"no tokenizer\.json, nor "):
        AutoTokenizer.from_pretrained(tmp_path)


# --- invalid files


def test_invalid_merges(tmp_path: Path) -> None:
    gpt1(tmp_path, [*GPT1_MERGES, "zz y"])
    with pytest.raises(
        CheckpointError, match=r"merges\.txt\) do not fit the vocabulary .*`zz`.*from one model"
    ):
        OpenAIGPTTokenizer.from_pretrained(tmp_path)
    gpt2(tmp_path)
    (tmp_path / "merges.txt").write_text("h e l\n")
    with pytest.raises(CheckpointError, match="a merge is two tokens"):
        GPT2Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not a text file"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_invalid_vocabularies(tmp_path: Path) -> None:
    gpt2(tmp_path)
    for text, message in (('{"a": ', "not valid JSON"), ("[1]", "holds a JSON list")):
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            GPT2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"OpenAI GPT's tokenizer needs both"):
        OpenAIGPTTokenizer(vocab={"<unk>": 0})
    for text, message in (("a\nb\n", "lacks the special token '</s>'"), ("a\na\n", "duplicate tokens")):
        (tmp_path / "vocab.txt").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            MPNetTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a vocabulary"):
        MPNetTokenizer(merges=[])
    with pytest.raises(HubError, match="does not exist"):
        MPNetTokenizer(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="is a file"):
        GPT2Tokenizer.from_pretrained(gpt2(tmp_path)).save_vocabulary(tmp_path / "vocab.json")
