"""Tokenizers without a framework: calls, arrays, encodings, decoding, special tokens, padding, refused arguments."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from trained_tokenizers import TEXT, tokenizer

from monoblock.generation.stopping import StopStringCriteria
from monoblock.tokenization import BatchEncoding, PreTrainedTokenizerFast
from monoblock.tokenization.tensors import CONVERTERS, converter


def test_importing_the_package_imports_no_third_party_module() -> None:
    code = (
        "import monoblock.tokenization as t, sys; t.__all__;"
        "print({'tokenizers', 'jinja2', 'numpy'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_tokenizing_imports_no_framework_and_no_jinja() -> None:
    code = (
        "import sys; from trained_tokenizers import tokenizer; tokenizer()('hi', return_tensors='np');"
        "print({'torch', 'jax', 'tensorflow', 'jinja2', 'huggingface_hub'} & {*sys.modules})"
    )
    folder = __file__.rpartition("/")[0]
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=folder).strip() == "set()"


# --- the call


def test_a_string_returns_flat_lists_and_a_list_returns_rows() -> None:
    t = tokenizer()
    one, many = t(TEXT[0]), t(TEXT)
    assert one["input_ids"] == many.input_ids[0] == t.encode(TEXT[0])
    assert one.attention_mask == [1] * len(one.input_ids)
    assert t.batch_decode(many) == t.decode(many["input_ids"]) == TEXT


def test_padding_side_and_truncation_side() -> None:
    t = tokenizer(padding_side="left", truncation_side="left")
    ids = t.encode(TEXT[0])
    out = t(["the", TEXT[0]], padding=True, truncation=True, max_length=4, return_tensors="np")
    assert out["input_ids"].tolist() == [[2, 2, 2, *t.encode("the")], ids[-4:]]
    assert out["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert t(["the", TEXT[0]], padding=True, padding_side="right")["input_ids"][0][-1] == 2


def test_empty_inputs() -> None:
    t = tokenizer()
    assert t("")["input_ids"] == []
    assert t([]) == {"input_ids": [], "attention_mask": []}
    assert t([], is_split_into_words=True)["input_ids"] == []
    for text, shape in (("", (1, 0)), (["", ""], (2, 0)), ([], (0,))):
        array = t(text, return_tensors="np")["input_ids"]
        assert array.shape == shape and array.dtype == np.int64
    assert tokenizer(template=True)("")["input_ids"] == [0, 1]


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((3,), {}, "text is int (3)"),
        ((b"bytes",), {}, "text is bytes"),
        (({"text": "x"},), {}, "text is dict"),
        ((["a", None],), {}, "text[1] is NoneType"),
        ((["a", 3],), {}, "text[1] is int"),
        (([1, 2],), {}, "text[0] is int"),
        ((["a", ["b", "c", "d"]],), {}, "text[1] is a list with str inside of 3"),
        ((["a", ["b", 3]],), {}, "text[1][1] is int"),
        (("a", 3), {}, "text_pair is int"),
        ((["a"], "b"), {}, "text_pair must be a list"),
        ((["a"], ["b", "c"]), {}, "text has 1 items and text_pair 2"),
        ((["a"], [None]), {}, "text_pair[0] is NoneType"),
        (("a b",), {"is_split_into_words": True}, "list of words"),
        ((["a", 3],), {"is_split_into_words": True}, "text is a list with int inside"),
        (([["a"], "b"],), {"is_split_into_words": True}, "text[1] is str"),
        ((None,), {}, "nothing to encode"),
        (("a",), {"text_target": 3}, "text_target is int"),
        (
            ("a",),
            {"padding": "wrong"},
            "padding='wrong': expected one of 'longest', 'max_length', 'do_not_pad'",
        ),
        (("a",), {"truncation": "wrong"}, "truncation='wrong': expected one of"),
        (("a",), {"padding": True, "padding_side": "top"}, "padding_side='top'"),
        (("a",), {"max_length": -1}, "max_length=-1: expected an integer of at least 0"),
        (("a",), {"max_length": "9"}, "max_length='9'"),
        (("a",), {"max_length": 9, "stride": 1.5}, "stride=1.5"),
        (("a",), {"max_length": 4, "stride": 4}, "stride=4 must be less than the 4 tokens"),
        (("a",), {"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        (
            ("a",),
            {"padding": "max_length", "truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
            "multiple",
        ),
        (("a b c d", "e"), {"truncation": "only_second", "max_length": 2}, "cannot be truncated"),
        (
            ("a",),
            {"return_tensors": "cupy"},
            "return_tensors='cupy': expected one of 'np', 'pt', 'jax', 'tf'",
        ),
        ((["a b", "c"],), {"return_tensors": "np"}, "pass padding=True"),
    ],
)
def test_invalid_calls_are_refused(args: tuple[Any, ...], options: dict[str, Any], expected: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        tokenizer()(*args, **options)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_lone_surrogates_are_refused() -> None:
    """As from `errors="surrogateescape"`; characters outside the BMP are accepted."""
    t, bad = tokenizer(), "der \ud800Fluß"
    calls: dict[str, Any] = {
        "text": lambda: t(bad),
        "text[1]": lambda: t(["a", bad]),
        "text_pair": lambda: t("a", bad),
        "text[0]": lambda: t([["a", bad]], is_split_into_words=True),
        "text_target": lambda: t(text_target=bad),
        "a token": lambda: t.convert_tokens_to_ids(["a", bad]),
        "a special token": lambda: t.add_special_tokens({"pad_token": bad}),
        "stop_strings": lambda: StopStringCriteria(t, ["x", bad]),
    }
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=rf"^{re.escape(name)} holds the lone surrogate U\+D800 at index 4,"
        ):
            call()
    with pytest.raises(ValueError, match="a token holds the lone surrogate"):
        t.add_tokens([bad])
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="text holds the lone surrogate"):
        t.apply_chat_template([{"role": "user", "content": bad}], chat_template=template)
    assert t("\U0001f600 Fluß")["input_ids"]


def test_unknown_arguments_are_refused() -> None:
    t = tokenizer()
    with pytest.raises(TypeError, match="paddign"):
        t("a", paddign=True)
    with pytest.raises(TypeError, match="paddign"):
        t("a", tokenizer_kwargs={"paddign": True})
    assert t("a", tokenizer_kwargs={"return_length": True})["length"] == [1]


def test_padding_needs_a_token() -> None:
    t = tokenizer(pad_token=None)
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        t("a", padding=True)
    t.pad_token = "<absent>"
    with pytest.raises(ValueError, match="not in the vocabulary"):
        t("a", padding=True)
    t.pad_token = t.eos_token
    assert t(["a", "a a"], padding=True)["input_ids"][0][-1] == 1


def test_max_length_without_effect_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="max_length has no effect") as caught:
        tokenizer()("a", padding=True, truncation=False, max_length=4)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer()("a", padding=True, truncation=False, max_length=4, verbose=False)


def test_texts_longer_than_model_max_length_are_logged_once(logs: pytest.LogCaptureFixture) -> None:
    t = tokenizer(model_max_length=3)
    for _ in range(2):
        t(TEXT[0])
    assert len([message for message in logs.messages if "more than the 3" in message]) == 1
    logs.clear()
    tokenizer(model_max_length=3)(TEXT[0], truncation=True)
    tokenizer(model_max_length=3)(TEXT[0], verbose=False)
    assert not logs.messages


def test_calls_of_several_threads_are_independent() -> None:
    """Padding and truncation are state of the backend."""
    t, wrong = tokenizer(), []

    def call(length: int) -> None:
        for _ in range(200):
            rows = t(TEXT, padding="max_length", truncation=True, max_length=length)["input_ids"]
            wrong.extend(row for row in rows if len(row) != length)

    threads = [threading.Thread(target=call, args=(length,)) for length in (3, 7, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- arrays


def test_import_errors_name_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("pt", "torch"), ("jax", "jax"), ("tf", "tf")):
        for module in (CONVERTERS[name].module, CONVERTERS[name].module.partition(".")[0]):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError) as caught:
            tokenizer()("a", return_tensors=name)
        assert f'pip install "monoblock[{extra}]"' in str(caught.value)


def test_conversion_of_arrays_and_ragged_lists() -> None:
    convert = converter("np")
    array = np.array([1])
    assert convert("x", array) is array
    assert convert("x", [np.array([1, 2]), np.array([3, 4])]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"labels has rows of 1 to 2 values.*does not pad labels"):
        convert("labels", [[1], [1, 2]])


def test_moving_to_a_device() -> None:
    class Tensor:
        def to(self, **options: Any) -> dict[str, Any]:
            return options

    moved = BatchEncoding({"input_ids": Tensor(), "text": "x"}).to("cuda:0", non_blocking=True)
    assert moved.data == {"input_ids": {"device": "cuda:0", "non_blocking": True}, "text": "x"}
    with pytest.raises(TypeError, match="takes a device"):
        BatchEncoding({"input_ids": Tensor()}).to(np.float16)
    with pytest.raises(ValueError, match='return_tensors="pt"'):
        tokenizer()("a").to("cpu")


# --- BatchEncoding


def test_encodings_are_mappings_that_pickle_and_copy() -> None:
    out = tokenizer()(TEXT)
    for same in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), copy.copy(out)):
        assert same == out and same.tokens(1) == out.tokens(1) and same.n_sequences == 1
    assert {**out} == dict(out) == out.data and list(out.keys()) == ["input_ids", "attention_mask"]
    assert len(out) == 2 and "input_ids" in out and out.is_fast
    assert [encoding.ids for encoding in out[1:]] == out["input_ids"][1:]
    assert BatchEncoding({"x": [1, 2, 3]})[1:] == {"x": [2, 3]}


def test_missing_keys_and_encodings_are_errors() -> None:
    with pytest.raises(AttributeError, match="it has: input_ids, attention_mask"):
        _ = tokenizer()("a").token_type_ids
    bare = BatchEncoding({"input_ids": [1]})
    with pytest.raises(ValueError, match="no encodings"):
        bare.word_ids()
    with pytest.raises(KeyError, match="no encodings"):
        _ = bare[0]


def test_tokens_words_and_characters() -> None:
    out = tokenizer(template=True)("the fox", "jumps")
    assert out.sequence_ids()[0] is None and {0, 1, None} == {*out.sequence_ids()}
    assert (
        out.token_to_chars(0) is None and out.token_to_chars(1) == (0, 3) and out.token_to_chars(1).end == 3
    )
    assert out.char_to_token(1) == 1 and out.char_to_word(5) == 1
    assert (
        out.token_to_word(-1) is None and out.word_to_tokens(0).start == 1 and out.word_to_chars(0) == (0, 3)
    )
    assert out.token_to_sequence(0, 1) == 0 and out.words() == out.word_ids()


# --- ids to text


def test_decode_accepts_sequences_arrays_and_encodings() -> None:
    t = tokenizer()
    ids = t.encode(TEXT[1])
    for given in (
        ids,
        tuple(ids),
        np.array(ids),
        [np.int64(i) for i in ids],
        (i for i in ids),
        {"input_ids": ids},
        t(TEXT[1]),
    ):
        assert t.decode(given) == TEXT[1]
    assert t.decode(ids[0]) == t.decode(np.int64(ids[0])) == t.decode([ids[0]])
    assert t.decode(range(3)) == "<s></s><pad>" and t.decode(range(3), skip_special_tokens=True) == ""
    assert t.decode(np.array([ids, ids])) == [TEXT[1]] * 2
    assert t.decode([]) == "" and t.batch_decode([]) == [] and t.batch_decode([[], ids]) == ["", TEXT[1]]
    # Ids above the vocabulary are skipped: many models have more ids than their tokenizers.
    assert t.decode([5000, *ids]) == TEXT[1]


@pytest.mark.parametrize("given", ["text", 1.5, [1.5], None, [None], object()])
def test_decoding_other_types_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="expected token ids"):
        tokenizer().decode(given)


def test_decoding_negative_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="-100 is not a token id"):
        tokenizer().decode([3, -100])


# --- special tokens


def test_names_and_ids_of_special_tokens() -> None:
    t = tokenizer()
    assert (t.bos_token, t.bos_token_id, t.mask_token, t.mask_token_id) == ("<s>", 0, None, None)
    t.pad_token = t.eos_token
    t.cls_token_id = 0
    assert t.pad_token_id == 1 and t.cls_token == "<s>"
    assert t.special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "cls_token": "<s>",
    }
    t.additional_special_tokens = ["fox", AddedToken("dog")]
    assert t.extra_special_tokens == ["fox", "dog"] and t.all_special_tokens == ["<s>", "</s>", "fox", "dog"]
    t.pad_token = None
    assert t.pad_token is None and t.pad_token_id is None
    assert not hasattr(t, "nothing_token")


def test_model_specific_special_tokens() -> None:
    t = tokenizer(image_token="<image>", extra_special_tokens={"audio_token": "<audio>"})
    assert t.image_token == "<image>" and t.convert_ids_to_tokens(t.audio_token_id) == "<audio>"
    t.image_token = "<pad>"
    assert t.image_token_id == 2 and t.encode("<audio>") == [t.audio_token_id]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: setattr(t, "pad_token", 3), "pad_token must be a string"),
        (lambda t: setattr(t, "pad_token_id", 10**6), "has no such id"),
        (lambda t: setattr(t, "extra_special_tokens", "abc"), "must be a list"),
        (lambda t: setattr(t, "extra_special_tokens", [3]), "must hold strings"),
        (lambda t: t.add_tokens([3]), "must hold strings"),
        (lambda t: t.add_special_tokens({"nonsense": "x"}), "is not a special token"),
        (lambda t: t.add_special_tokens({"pad_token": None}), "cannot be added"),
        (
            lambda t: (
                setattr(t, "add_bos_token", True)
                or setattr(t, "bos_token", None)
                or t.update_post_processor()
            ),
            "bos_token",
        ),
        (lambda t: tokenizer(bos_token=3), "bos_token must be a string"),
        (lambda t: tokenizer(padding_side="top"), "padding_side='top'"),
        (lambda t: tokenizer(extra_special_tokens="abc"), "must be a list"),
        (lambda t: PreTrainedTokenizerFast(), "from_pretrained"),
        (lambda t: PreTrainedTokenizerFast(tokenizer_object="x"), "tokenizer_object must be"),
    ],
)
def test_invalid_special_tokens_are_refused(change: Any, expected: str) -> None:
    with pytest.raises((ValueError, TypeError), match=expected):
        change(tokenizer())


def test_added_tokens_are_matched_in_text_and_can_be_skipped() -> None:
    t = tokenizer()
    before = len(t)
    assert t.add_tokens(["foxdog", "foxdog"]) == 1
    assert (
        t.add_special_tokens({"sep_token": "<sep>", "extra_special_tokens": [AddedToken("<x>", lstrip=True)]})
        == 2
    )
    assert len(t) == before + 3 and t.vocab_size < len(t) == len(t.get_vocab())
    ids = t.encode("a foxdog<sep>  <x>b")
    assert t.convert_ids_to_tokens(ids) == ["a", "Ġ", "foxdog", "<sep>", "<x>", "b"]
    assert t.decode(ids, skip_special_tokens=True) == "a foxdogb"
    assert t.get_added_vocab()["<x>"] == before + 2 and t.added_tokens_encoder == t.get_added_vocab()
    assert t.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["a", "Ġ", "foxdog", "b"]


def test_special_tokens_around_ids() -> None:
    t = tokenizer(template=True)
    t("a", padding="max_length", max_length=30)  # its settings remain in the backend
    first, second = t.encode("the fox", add_special_tokens=False), t.encode("dog", add_special_tokens=False)
    out = t("the fox", "dog", return_token_type_ids=True, return_special_tokens_mask=True)
    assert t.build_inputs_with_special_tokens(first, second) == out["input_ids"]
    assert t.create_token_type_ids_from_sequences(first, second) == out["token_type_ids"]
    assert t.get_special_tokens_mask(first, second) == out["special_tokens_mask"]
    assert (
        t.get_special_tokens_mask(out["input_ids"], already_has_special_tokens=True)
        == out["special_tokens_mask"]
    )
    assert t.build_inputs_with_special_tokens(first) == [0, *first, 1]
    assert t.num_special_tokens_to_add() == 2 and t.num_special_tokens_to_add(pair=True) == 3
    with pytest.raises(ValueError, match="one row holds both"):
        t.get_special_tokens_mask(first, second, already_has_special_tokens=True)


def test_add_bos_token_and_add_eos_token() -> None:
    t = tokenizer(add_bos_token=True)
    assert t.add_bos_token and not t.add_eos_token
    t.add_eos_token = True
    ids = t.encode("fox", add_special_tokens=False)
    assert t.encode("fox") == [0, *ids, 1] and t.encode("fox", "fox") == [0, *ids, 1, 0, *ids, 1]
    t.add_bos_token = False
    assert t.encode("fox") == [*ids, 1]


def test_split_special_tokens() -> None:
    t = tokenizer()
    assert t.encode("</s>") == [1]
    assert 1 not in t.encode("</s>", split_special_tokens=True)
    assert t.encode("</s>") == [1]


# --- the object


def test_tokenizer_pickles_and_copies() -> None:
    t = tokenizer(padding_side="left", image_token="<image>")
    t.pad_token = t.eos_token
    for same in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t), copy.copy(t)):
        assert same(TEXT, padding=True) == t(TEXT, padding=True)
        assert same.pad_token == "</s>" and same.image_token == "<image>" and repr(same) == repr(t)
    assert t  # a tokenizer is never empty


def test_changing_a_copy_leaves_the_original() -> None:
    t = tokenizer()
    other = copy.deepcopy(t)
    other.add_tokens(["foxdog"])
    other.pad_token = None
    assert len(other) == len(t) + 1 and t.pad_token == "<pad>"


def test_repr() -> None:
    text = repr(tokenizer(model_max_length=77))
    assert text.startswith("PreTrainedTokenizerFast(") and "model_max_length=77" in text and "'</s>'" in text


# --- pad


def test_pad_of_rows_with_labels() -> None:
    t = tokenizer(padding_side="left")
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": np.array([5]), "labels": 0}]
    before = copy.deepcopy(rows)
    out = t.pad(rows, pad_to_multiple_of=4, return_tensors="np")
    assert out["input_ids"].tolist() == [[2, 5, 6, 7], [2, 2, 2, 5]]
    assert out["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert out["labels"].tolist() == [1, 0]
    assert rows[0] == before[0] and rows[1]["input_ids"].tolist() == [5]
    single = {"input_ids": [5]}
    assert t.pad(single, padding="max_length", max_length=3) == {
        "input_ids": [2, 2, 5],
        "attention_mask": [0, 0, 1],
    }
    assert single == {"input_ids": [5]}
    assert isinstance(t.pad([{"input_ids": np.array([1])}])["input_ids"], np.ndarray)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"labels": [1]}, "needs 'input_ids'; got the keys: labels"),
        ([{"input_ids": [1]}, {"attention_mask": [1]}], "row 1 has no 'input_ids'"),
        ("text", "takes a dictionary"),
        (["text"], "holds something else"),
        (
            {"input_ids": [[1], [2]], "attention_mask": [[1]]},
            "2 rows of 'input_ids' but not as many of 'attention_mask'",
        ),
        ({"input_ids": "text"}, "takes ids as lists or arrays"),
    ],
)
def test_invalid_arguments_of_pad_are_refused(given: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        tokenizer().pad(given)
