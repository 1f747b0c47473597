"""The tokenizer against transformers' own, on the tokenizer of MPT and on small ones trained here."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from monoblock.tokenization import (
    AutoTokenizer,
    GPTNeoXTokenizerFast,
    PreTrainedTokenizerFast,
    get_json_schema,
)

transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parents[2] / "../shared/data"
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Grüße aus Köln, 你好世界, здравствуй, مرحبا, 🎉👩‍👩‍👧!",
]
LINES = [
    *TEXT,
    "",
    " ",
    "  two  spaces   three    four\t\ttabs\r\n\n",
    "<|endoftext|> inside <|endoftext|>",
    "e\u0301 composed and é",
    "zero\u200bwidth \x00 \x07 control",
    "it's I'm we've don't they're , . ! ?",
]


def trained(trainer: Any, model: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


def byte_level(folder: Path) -> dict[str, Any]:
    """As GPT-NeoX: no template, trimmed offsets, a run of spaces as an added token."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = trained(
        trainer,
        models.BPE(),
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        post_processor=processors.ByteLevel(trim_offsets=True),
        decoder=decoders.ByteLevel(),
    )
    tokenizer.add_tokens(["    ", "  "])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>", "unk_token": "<|endoftext|>"}


def with_template(folder: Path) -> dict[str, Any]:
    """As Llama's: `<s> A </s>`, and for pairs `<s> A </s> <s> B </s>` with token types 0 and 1."""
    config = byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s>:1 $B:1 </s>:1", special_tokens=ids
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {
        **config,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def word_pieces(folder: Path) -> dict[str, Any]:
    """As BERT's: lower-case word pieces, whose decoded text is cleaned."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = trained(
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        models.WordPiece(unk_token="[UNK]"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
        post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad", "unk", "cls", "sep", "mask")
    return {f"{name}_token": f"[{name.upper()}]" for name in names} | {"clean_up_tokenization_spaces": True}


def neox(folder: Path) -> dict[str, Any]:
    source = DATA / "gpt-neox/tokenizer.json"
    if not source.exists():
        pytest.skip("the tokenizer of GPT-NeoX is not there")
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    return {"tokenizer_class": "GPTNeoXTokenizer", "model_max_length": 2048, "eos_token": "<|endoftext|>"}


MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "byte-level": byte_level,
    "template": with_template,
    "word-pieces": word_pieces,
    "neox": neox,
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 40,
        **MAKERS[request.param](folder),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def outcome(call: Callable[[], Any]) -> Any:
    """The result as plain values, or that there was an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # the backend of both panics at some strides; here that is a ValueError
            return "an error"
    if hasattr(result, "keys"):
        return {key: plain(value) for key, value in result.items()}
    return plain(result)


def plain(value: Any) -> Any:
    return (type(value).__name__, str(value.dtype), value.tolist()) if hasattr(value, "tolist") else value


def same(pair: tuple[Any, Any], call: Callable[[Any], Any], what: str = "") -> None:
    mine, theirs = (outcome(lambda tokenizer=tokenizer: call(tokenizer)) for tokenizer in pair)
    assert mine == theirs, f"{what}\nmonoblock:    {mine}\ntransformers: {theirs}"


INPUTS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "text": ((TEXT[0],), False),
    "empty": (("",), False),
    "pair": ((TEXT[0], TEXT[1]), False),
    "batch": ((LINES,), False),
    "pairs": ((TEXT, TEXT[::-1]), False),
    "pair tuples": (([(TEXT[0], TEXT[1]), (TEXT[2], "short")],), False),
    "words": (("these are  words".split(),), True),
    "batch of words": (([["a", " b", "cde"], ["fox"], []],), True),
    "pairs of words": (([["a", "b"], ["fox"]], [["x"], ["jumps", "over"]]), True),
    "tuples of words": (([(["a", "b"], ["fox"]), (["x"], ["jumps", "over"])],), True),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_combination_of_padding_and_truncation(pair: tuple[Any, Any], kind: str) -> None:
    texts, words = INPUTS[kind]
    for padding, truncation, max_length, stride, overflow, side in itertools.product(
        (False, True, "max_length", "do_not_pad"),
        (None, False, True, "only_first", "only_second"),
        (None, 9, 16),
        (0, 2),
        (False, True),
        (None, "left"),
    ):
        if (side and not padding) or (stride and not truncation):
            continue  # these have no effect there
        options = {
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "stride": stride,
            "return_overflowing_tokens": overflow,
            "padding_side": side,
            "is_split_into_words": words,
            "return_special_tokens_mask": True,
            "return_offsets_mapping": True,
            "return_token_type_ids": True,
            "return_length": True,
            "verbose": False,
        }
        same(pair, lambda tokenizer, options=options: tokenizer(*texts, **options), f"{kind} {options}")


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_arrays(pair: tuple[Any, Any], framework: str) -> None:
    for texts in ((TEXT[0],), ("",), (TEXT,), (["", ""],), (TEXT[0], TEXT[1])):
        for overflow in (False, True):
            same(
                pair,
                lambda tokenizer, texts=texts, overflow=overflow: tokenizer(
                    *texts,
                    padding=True,
                    truncation=True,
                    max_length=8,
                    return_tensors=framework,
                    return_overflowing_tokens=overflow,
                    return_offsets_mapping=True,
                ),
                f"{texts} {overflow}",
            )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_special_tokens": False},
        {"return_attention_mask": False},
        {"return_token_type_ids": True},
        {"padding": True, "pad_to_multiple_of": 8},
        {"padding": True, "truncation": True, "max_length": 12, "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 10, "pad_to_multiple_of": 8, "truncation": False},
        {"split_special_tokens": True},
        {"tokenizer_kwargs": {"padding": "max_length"}},
        {"truncation": "wrong"},
        {"padding": "wrong"},
        {"return_tensors": "wrong"},
        {"truncation": True, "max_length": 4, "stride": 9},
    ],
)
def test_other_arguments(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    same(pair, lambda tokenizer: tokenizer(LINES, **options), str(options))
    same(pair, lambda tokenizer: tokenizer(TEXT[0], **options), str(options))


def test_targets(pair: tuple[Any, Any]) -> None:
    same(
        pair,
        lambda t: t(
            TEXT, text_target=TEXT[::-1], padding=True, truncation=True, max_length=9, max_target_length=6
        ),
    )
    same(pair, lambda t: t(text_target=TEXT[0]))
    same(pair, lambda t: t())


def test_encode_tokenize_and_vocabulary(pair: tuple[Any, Any]) -> None:
    for line in LINES:
        same(pair, lambda t, line=line: t.encode(line))
        same(
            pair,
            lambda t, line=line: t.encode(
                line, TEXT[0], add_special_tokens=False, truncation=True, max_length=5
            ),
        )
        same(pair, lambda t, line=line: t.tokenize(line))
        same(pair, lambda t, line=line: t.tokenize(line, TEXT[0], add_special_tokens=True))
    same(pair, lambda t: (len(t), t.vocab_size, t.get_vocab(), t.get_added_vocab()))
    same(pair, lambda t: t.convert_ids_to_tokens([0, 5, 1], skip_special_tokens=True))
    same(pair, lambda t: (t.convert_ids_to_tokens(7), t.convert_tokens_to_ids("nonsense token")))
    same(pair, lambda t: t.convert_tokens_to_ids(t.tokenize(TEXT[2])))
    same(pair, lambda t: t.convert_tokens_to_string(t.tokenize(TEXT[2])))
    same(pair, lambda t: (t.num_special_tokens_to_add(), t.num_special_tokens_to_add(pair=True)))
    same(pair, lambda t: (t.max_len_single_sentence, t.max_len_sentences_pair, t.is_fast))


def test_decoding(pair: tuple[Any, Any]) -> None:
    import numpy as np
    import torch

    ids = pair[0](LINES)["input_ids"]
    for skip, clean in itertools.product((False, True), (None, False, True)):
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
        same(pair, lambda t, options=options: t.batch_decode(ids, **options), str(options))
        same(pair, lambda t, options=options: t.decode(ids, **options), str(options))
    for one in (
        ids[0],
        ids[0][0],
        np.array(ids[0]),
        torch.tensor(ids[0]),
        torch.tensor([ids[0]]),
        torch.tensor(3),
        [],
    ):
        same(pair, lambda t, one=one: t.decode(one), str(one))
    same(pair, lambda t: t.batch_decode([torch.tensor(row) for row in ids]))
    same(pair, lambda t: t.batch_decode(ids[0]))
    same(pair, lambda t: t.decode(t(TEXT[0])))


SPECIAL = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]


def specials(tokenizer: Any) -> Any:
    named = {
        name: (getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id"))
        for name in SPECIAL
    }
    extra = (tokenizer.extra_special_tokens, tokenizer.extra_special_tokens_ids)
    return named, extra, tokenizer.special_tokens_map, tokenizer.all_special_tokens, tokenizer.all_special_ids


def test_special_tokens(folder: Path) -> None:
    pair = AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    same(pair, specials)

    def change(tokenizer: Any) -> Any:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.mask_token_id = 7
        counts = [
            tokenizer.add_tokens(["newtoken", "fox"]),
            tokenizer.add_special_tokens({"sep_token": "<sep>", "additional_special_tokens": ["<a>", "<b>"]}),
            tokenizer.add_special_tokens(
                {"extra_special_tokens": ["<c>"]}, replace_extra_special_tokens=False
            ),
            tokenizer.add_tokens("<|d|>", special_tokens=True),
        ]
        text = "newtoken fox <sep> <a><b> <c>x<|d|>"
        ids = tokenizer.encode(text)
        return (
            counts,
            specials(tokenizer),
            ids,
            tokenizer.decode(ids, skip_special_tokens=True),
            len(tokenizer),
        )

    same(pair, change)
    for wrong in ({"no_token": "x"}, {"pad_token": 3}, {"extra_special_tokens": "abc"}):
        same(pair, lambda t, wrong=wrong: t.add_special_tokens(wrong))
    same(pair, lambda t: setattr(t, "pad_token", 3))


@pytest.mark.parametrize(
    "overrides",
    [
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"model_max_length": 7},
        {"pad_token": "!", "bos_token": "<new>"},
        {"additional_special_tokens": ["<x>", "<y>"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"use_fast": False},
        {"split_special_tokens": True},
        {"eos_token": "</e>", "bos_token": "</b>", "add_bos_token": True},
        {"eos_token": "</e>", "bos_token": "</b>", "add_bos_token": True, "add_eos_token": True},
        {"some_new_option": 3},
    ],
)
def test_overrides(folder: Path, overrides: dict[str, Any]) -> None:
    loaders = AutoTokenizer, transformers.AutoTokenizer
    pair = tuple(loader.from_pretrained(folder, **overrides) for loader in loaders)
    same(pair, specials)
    options = {"padding": True, "truncation": True, "max_length": 8}
    same(pair, lambda t: t([*TEXT, "<x><new></e> !<image>"], **options))
    same(pair, lambda t: t("a <x><new></e>", "!<image> b"))
    assert pair[0].init_kwargs.get("some_new_option") == pair[1].init_kwargs.get("some_new_option")


def test_padding_encoded_rows(pair: tuple[Any, Any]) -> None:
    import numpy as np
    import torch

    rows = [pair[0](text, return_special_tokens_mask=True, return_token_type_ids=True).data for text in TEXT]
    inputs: list[Any] = [
        rows,
        {key: [row[key] for row in rows] for key in rows[0]},
        rows[0],
        {"input_ids": [[1, 2], [], [3]]},
        [{"input_ids": np.array([1, 2, 3])}, {"input_ids": np.array([1])}],
        [
            {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(1)},
            {"input_ids": torch.tensor([1]), "labels": torch.tensor(0)},
        ],
        [{"labels": [1]}],
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1], "labels": [1]}],
    ]
    for given, options in itertools.product(
        inputs,
        (
            {},
            {"padding": "max_length", "max_length": 6},
            {"padding": False},
            {"pad_to_multiple_of": 8},
            {"padding_side": "left"},
            {"return_attention_mask": False},
            {"return_tensors": "pt"},
        ),
    ):
        if "return_attention_mask" in options and "attention_mask" in str(given):
            continue  # transformers then returns the mask unpadded; here it is left out
        if options == {"padding": False} and "array" in str(given):
            continue  # transformers then returns an array of arrays; here rows of unequal length are refused
        same(
            pair,
            lambda t, given=given, options=options: t.pad(_copy(given), verbose=False, **options),
            f"{given} {options}",
        )


def _copy(value: Any) -> Any:
    """transformers changes the dictionaries that it is given."""
    return dict(value) if isinstance(value, dict) else [dict(row) for row in value]


def test_where_tokens_come_from(pair: tuple[Any, Any]) -> None:
    mine, theirs = (tokenizer(["the fox jumps", TEXT[2]], [TEXT[0], "x yz"]) for tokenizer in pair)
    assert len(mine) == len(theirs) and list(mine) == list(theirs)
    for row in range(2):
        assert mine.tokens(row) == theirs.tokens(row)
        assert mine.word_ids(row) == theirs.word_ids(row)
        assert mine.sequence_ids(row) == theirs.sequence_ids(row)
        for index in range(len(mine.tokens(row))):
            assert mine.token_to_chars(row, index) == theirs.token_to_chars(row, index)
            assert mine.token_to_word(row, index) == theirs.token_to_word(row, index)
            assert mine.token_to_sequence(row, index) == theirs.token_to_sequence(row, index)
        for index in range(12):
            assert mine.char_to_token(row, index) == theirs.char_to_token(row, index)
            assert mine.char_to_token(row, index, 1) == theirs.char_to_token(row, index, 1)
            assert mine.char_to_word(row, index) == theirs.char_to_word(row, index)
    assert mine.word_to_tokens(1, 1) == theirs.word_to_tokens(1, 1)
    assert mine.word_to_chars(1, 1) == theirs.word_to_chars(1, 1)
    assert mine.char_to_token(2) == theirs.char_to_token(2)
    assert mine[0].ids == theirs[0].ids and mine.n_sequences == theirs.n_sequences == 2


# --- files


def change_everything(tokenizer: Any) -> None:
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
def test_saved_here_opens_there_and_back(folder: Path, tmp_path: Path, prepare: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change_everything(tokenizer)
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


def test_a_folder_with_a_model_config(folder: Path, tmp_path: Path) -> None:
    """MPT's folders name GPT-NeoX's class or none; either way the ids are transformers'."""
    for config in (
        {},
        {"tokenizer_class": "GPTNeoXTokenizerFast"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ):
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt", "vocab_size": 500}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if folder.name.startswith("word") and "PreTrained" not in str(config):
            continue  # transformers would make byte-level BPE out of word pieces
        pair = AutoTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        same(pair, lambda t: t(TEXT, return_offsets_mapping=True), str(config))
        same(pair, specials, str(config))


@pytest.mark.parametrize("config", [None, {"bos_token": "<s>", "additional_special_tokens": ["<old>"]}])
def test_files_of_older_formats(tmp_path: Path, config: dict[str, Any] | None) -> None:
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
    """Ids equal on much mixed text, and decoding gives the normalised text back."""
    import random
    import unicodedata

    config = neox(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pair = AutoTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
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


# --- chat templates

USER = {"role": "user", "content": 'What is <the> weather in Köln? & "why" 你好  '}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "several": [
        USER,
        {"role": "assistant", "content": " Rain. "},
        {"role": "user", "content": "And tomorrow?"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "reply": [USER, {"role": "assistant", "content": "It is"}],
    "none content": [USER, {"role": "assistant", "content": "x", "tool_calls": None, "name": None}],
    "calls": [
        USER,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}},
                }
            ],
        },
        {"role": "tool", "name": "get_weather", "content": "rain", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks"},
    ],
    "wrong order": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
    "blocks": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ],
    "reasoning": [USER, {"role": "assistant", "reasoning": "Hm.", "content": "x"}],
}

CHATML = """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You help.' %}{% set rest = messages %}{% endif %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- for message in rest %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
        {%- generation %}{{ message.content }}{{- '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ message.content }}{{ '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if documents %}{% for d in documents %}{{ loop.index }}/{{ loop.length }} {{ d.title }}: {{ d.text }}
{% endfor %}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if mood is defined %}{{ mood }}{% endif %}{% endif %}"""

TRIMMING = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
MACROS = """{%- macro show(m) -%}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{%- endmacro -%}
{%- set ns = namespace(count=0) -%}
{%- for m in messages if m.role != 'system' -%}{%- set ns.count = ns.count + 1 -%}{{ show(m) }}{%- else -%}none{%- endfor -%}
{{ ns.count }} {{ dict(a=1, b=[1, 2]) | tojson }} {{ messages | map(attribute='role') | join(',') }} {{ range(3) | list }}
{{ messages[0].get('role', '').strip().upper() if messages[0].content is string }} {{ bos_token is defined }}"""


def templates() -> dict[str, str]:
    found = {"chatml": CHATML, "trimming": TRIMMING, "macros": MACROS}
    return found | {
        path.stem: path.read_text() for path in sorted((DATA / "mistral/chat_templates").glob("*.jinja"))
    }


def get_weather(city: str, days: int = 1, unit: str = "celsius") -> dict:
    """Forecast the weather.

    Args:
        city: The city & country,
            such as "Köln, Germany"
        days: How many days
        unit: The unit (choices: ["celsius", "kelvin"])

    Returns:
        The forecast
    """
    return {"city": city, "days": days, "unit": unit}


TOOLS = [
    None,
    [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "<é>",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ],
    [get_weather],
]


@pytest.fixture(scope="module")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("chat")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **with_template(folder)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", templates())
@pytest.mark.parametrize("chat", CHATS)
def test_chat_templates(chat_pair: tuple[Any, Any], name: str, chat: str) -> None:
    template = templates()[name]
    for tools, ending, tokenize in itertools.product(
        TOOLS, ({}, {"add_generation_prompt": True}, {"continue_final_message": True}), (False, True)
    ):
        options = {"tools": tools, "chat_template": template, "tokenize": tokenize, **ending}
        same(
            chat_pair, lambda t, options=options: t.apply_chat_template(CHATS[chat], **options), f"{options}"
        )


def test_chat_arguments(chat_pair: tuple[Any, Any]) -> None:
    batch = [CHATS["one"], CHATS["several"]]
    for options in (
        {"return_dict": False},
        {"return_dict": False, "return_tensors": "pt", "padding": True},
        {"return_tensors": "pt", "padding": True, "return_assistant_tokens_mask": True},
        {"return_assistant_tokens_mask": True},
        {"return_assistant_tokens_mask": True, "padding": True, "tokenizer_kwargs": {"padding_side": "left"}},
        {"truncation": True, "max_length": 30, "return_assistant_tokens_mask": True},
        {"tokenizer_kwargs": {"return_offsets_mapping": True}},
        {"documents": [{"title": "t", "text": "x <y>"}], "mood": "happy", "add_generation_prompt": True},
        {"tokenize": False},
        {"tokenize": False, "return_assistant_tokens_mask": True},
        {"add_generation_prompt": True, "continue_final_message": True},
        {"continue_final_message": "reasoning_content"},
        {"continue_final_message": True, "return_assistant_tokens_mask": True},
        {"documents": ["no"]},
        {"tools": [3]},
    ):
        for chat in (batch, CHATS["several"], tuple(CHATS["reasoning"]), [], [[]], ["text"], "text"):
            same(
                chat_pair,
                lambda t, chat=chat, options=options: t.apply_chat_template(
                    chat, chat_template=CHATML, **options
                ),
                f"{chat} {options}",
            )


def test_one_message_more(chat_pair: tuple[Any, Any]) -> None:
    message = {"role": "user", "content": "And tomorrow?"}
    for history in (None, CHATS["reply"]):
        same(
            chat_pair,
            lambda t, history=history: t.encode_message_with_chat_template(
                message, history, chat_template=CHATML
            ),
        )


def test_named_templates(chat_pair: tuple[Any, Any], tmp_path: Path) -> None:
    named = {"default": TRIMMING, "tool_use": CHATML, "other": MACROS}
    for tokenizer in chat_pair:
        tokenizer.save_pretrained(tmp_path / type(tokenizer).__module__)
    mine = AutoTokenizer.from_pretrained(tmp_path / type(chat_pair[1]).__module__, chat_template=named)
    theirs = transformers.AutoTokenizer.from_pretrained(
        tmp_path / type(chat_pair[0]).__module__, chat_template=named
    )
    for options in ({}, {"tools": []}, {"chat_template": "other"}, {"chat_template": "{{ 1 }}"}):
        same((mine, theirs), lambda t, options=options: t.get_chat_template(**options))
    mine.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == named
    theirs.save_pretrained(tmp_path / "theirs")
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").chat_template == named
    mine.save_pretrained(tmp_path / "inside", save_jinja_files=False)
    assert not (tmp_path / "inside/chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "inside").chat_template == named
    assert AutoTokenizer.from_pretrained(tmp_path / "inside").chat_template == named


def hinted(
    a: int | None,
    b: list[str],
    c: dict[str, float],
    d: tuple[int, str],
    e: "int | str | list[int]",
    f: Any = None,
    *,
    g: bool = True,
) -> None:
    """Do it.

    More: words.

    Args:
        a: first
        b: second: with a colon
          and more
            and deeper: yes

        c: third
        d: fourth
        e: fifth (choices: [1, "x "])
        f: sixth
        g: seventh

    Raises:
        ValueError: never
    """


class Box:
    def method(self, x: float) -> "Box":
        """Weigh.

        Args:
            x: how much
        Returns:
            A box
        """
        return self


def undescribed(x: int) -> int:
    """Nothing about x."""
    return x


def unhinted(x) -> int:
    """No hint.

    Args:
        x: it
    """
    return x


def undocumented(x: int) -> int:
    return x


@pytest.mark.parametrize("function", [get_weather, hinted, Box().method, undescribed, unhinted, undocumented])
def test_schemas_of_functions(function: Callable[..., Any]) -> None:
    from transformers.utils import get_json_schema as reference

    assert outcome(lambda: get_json_schema(function)) == outcome(lambda: reference(function))
