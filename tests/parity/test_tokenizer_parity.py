"""Calls of tokenizers against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tokenizers_compared import KINDS, LINES, TEXT, both, same, saved_tokenizer, specials


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokenizer(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    return both(folder)


INPUTS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "text": ((TEXT[0],), False),
    "empty": (("",), False),
    "pair": ((TEXT[0], TEXT[1]), False),
    "batch": ((LINES,), False),
    "pairs": ((TEXT, TEXT[::-1]), False),
    "pair tuples": (([(TEXT[0], TEXT[1]), (TEXT[2], "short")],), False),
    "words": ((["these", "are", "words"],), True),
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
            continue  # arguments without effect in transformers
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


def test_special_tokens(folder: Path) -> None:
    pair = both(folder)
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
    pair = both(folder, **overrides)
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
            continue  # transformers returns the mask unpadded; here it is omitted
        if options == {"padding": False} and "array" in str(given):
            continue  # transformers returns an array of arrays; here rows of unequal lengths raise
        same(
            pair,
            lambda t, given=given, options=options: t.pad(_copy(given), verbose=False, **options),
            f"{given} {options}",
        )


def _copy(value: Any) -> Any:
    """A copy, since transformers modifies its arguments."""
    return dict(value) if isinstance(value, dict) else [dict(row) for row in value]


def test_token_word_and_character_mappings(pair: tuple[Any, Any]) -> None:
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
