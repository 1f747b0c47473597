"""Type checks of fields in configs and in JSON files: accepted values, refused values, error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pytest

import monoblock
from monoblock.checkpoint.files import read_json
from monoblock.errors import CheckpointError, FieldError
from monoblock.families import FAMILIES, family
from monoblock.field_types import MAX_INTEGER, brief, checked, declared


class Inner(TypedDict, total=False):
    """A nested field."""

    name: str
    factor: float | None


VALID: list[tuple[Any, Any, Any]] = [
    (int, 3, 3),
    (int, 32.0, 32),
    (int, np.int64(5), 5),
    (int, MAX_INTEGER, MAX_INTEGER),
    (float, 3, 3),
    (float, 0.5, 0.5),
    (float, np.float32(0.5), 0.5),
    (bool, True, True),
    (str, "a", "a"),
    (int | None, None, None),
    (int | None, 2.0, 2),
    (float | int, 4.0, 4.0),
    (bool | str | None, "never", "never"),
    (int | list[int] | None, [1, 2.0], [1, 2]),
    (list[str] | None, ["a"], ["a"]),
    (tuple[int, float], [3, 1.5], [3, 1.5]),
    (list[tuple[list[str], int]], [[["a"], 2.0]], [[["a"], 2]]),
    (dict[str, int], {"a": 1.0}, {"a": 1}),
    (Inner | None, {"name": "a", "factor": None, "more": [1]}, {"name": "a", "factor": None, "more": [1]}),
    (Literal["left", "right"], "left", "left"),
    (Any, object, object),
]

INVALID: list[tuple[Any, Any, str]] = [
    (int, "3", r"Owner\.field must be an integer, got '3'"),
    (int, 3.5, "an integer, got 3.5"),
    (int, True, "an integer, got True"),
    (int, None, "an integer, got None"),
    (int, 2**63, "an integer of at most 63 bits, got 9223372036854775808"),
    (int, 1e300, "an integer of at most 63 bits"),
    (float, "0.1", "a number, got '0.1'"),
    (float, float("nan"), "a finite number, got nan"),
    (float, float("inf"), "a finite number, got inf"),
    (bool, 1, "True or False, got 1"),
    (str, 3, "a string, got 3"),
    (int | None, [1], r"an integer or None, got \[1\]"),
    (list[str] | None, "a", "a list of strings or None, got 'a'"),
    (list[str] | None, ["a", 3], r"Owner\.field\[1\] must be a string, got 3"),
    (int | list[int] | None, [1, "b"], r"Owner\.field\[1\] must be an integer, got 'b'"),
    (tuple[int, float], [3], r"a list of 2 values, got \[3\]"),
    (dict[str, int], {"a": "b"}, r"Owner\.field\['a'\] must be an integer, got 'b'"),
    (dict[str, int], [1], r"a dict, got \[1\]"),
    (Inner | None, {"factor": "x"}, r"Owner\.field\.factor must be a number or None, got 'x'"),
    (Inner, {"name": None}, r"Owner\.field\.name must be a string, got None"),
    (Literal["left", "right"], "up", "'left' or 'right', got 'up'"),
]


@pytest.mark.parametrize(("kind", "value", "expected"), VALID, ids=str)
def test_valid_values(kind: Any, value: Any, expected: Any) -> None:
    found = checked("Owner", "field", value, kind)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("kind", "value", "message"), INVALID, ids=str)
def test_invalid_values(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        checked("Owner", "field", value, kind)
    assert caught.value.field == "field"


def test_values_are_shortened_in_messages() -> None:
    for value in ("x" * 10**6, [[0] * 1000] * 1000, {str(i): i for i in range(10**4)}, 10**4000):
        assert len(brief(value)) < 400


def test_every_field_of_every_config_has_a_type() -> None:
    """Nested fields, too; an unresolved annotation would be Any."""
    for model_type in FAMILIES:
        config = family(model_type).config
        for kind in (config, *config.sub_configs.values()):
            untyped = [name for name in kind.fields if kind._types[name] is Any]
            assert set(untyped) <= set(kind.sub_configs)
    assert Any not in declared(monoblock.families.common.RopeFields).values()


# ------------------------------------------------------------------ configs and their files

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
MISTRAL = {"model_type": "mistral", "vocab_size": 61, "num_key_value_heads": 4, **SIZES}


def config_file(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**MISTRAL, **fields}))
    return folder


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": "3"}, "num_hidden_layers must be an integer, got '3'"),
    ({"num_hidden_layers": None}, "num_hidden_layers must be an integer, got None"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at least 1 and at most 1024, got 1000000000"),
    ({"vocab_size": [61]}, r"vocab_size must be an integer, got \[61\]"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, got '1e-5'"),
    ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
    ({"rope_scaling": {"rope_type": None}}, "rope_scaling.rope_type must be a string, got None"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": [2]}}, "rope_scaling.factor must be a number"),
    ({"rope_scaling": "linear"}, "rope_scaling must be a dict or None, got 'linear'"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta must be a number, got None"),
    ({"eos_token_id": "2"}, "eos_token_id must be an integer or a list of integers or None"),
    ({"eos_token_id": [2, None]}, r"eos_token_id\[1\] must be an integer, got None"),
    ({"pad_token_id": {}}, "pad_token_id must be an integer or None"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be True or False, got 'false'"),
    ({"architectures": "MistralForCausalLM"}, "architectures must be a list of strings or None"),
    ({"id2label": {"zero": "a"}}, "id2label must have integer ids, got 'zero'"),
    ({"id2label": ["a"]}, "id2label must be a dict or None"),
    ({"label2id": {"a": "b"}}, "label2id must have integer ids, got 'b'"),
    ({"num_labels": 10**7}, "num_labels must be an integer from 1 to 1,048,576"),
    ({"num_labels": "2"}, "num_labels must be an integer, got '2'"),
    ({"torch_dtype": 16}, "dtype must be a string or None, got 16"),
    ({"classifier_dropout": "0.1"}, "classifier_dropout must be a number or None"),
    ({"temperature": "hot"}, "temperature must be a number or None, got 'hot'"),
    ({"attn_implementation": 3}, "attn_implementation must be a string or None"),
]


@pytest.mark.parametrize(("fields", "message"), BROKEN, ids=str)
def test_type_errors_name_file_field_type_and_value(tmp_path: Path, fields: Any, message: str) -> None:
    folder = config_file(tmp_path, **fields)
    for read in (monoblock.AutoConfig.from_pretrained, monoblock.MistralConfig.from_pretrained):
        with pytest.raises(FieldError, match=message) as caught:
            read(folder).to_spec()
        if (
            "num_hidden_layers must be at least" not in message
        ):  # a value of the right type, refused by to_spec()
            assert str(caught.value).startswith(f"{folder / 'config.json'}: MistralConfig.")


def test_type_errors_of_arguments_do_not_name_the_file(tmp_path: Path) -> None:
    folder = config_file(tmp_path)
    with pytest.raises(FieldError, match=r"^MistralConfig\.vocab_size must be an integer"):
        monoblock.AutoConfig.from_pretrained(folder, vocab_size="many")


def test_an_argument_replaces_an_invalid_field_of_the_file(tmp_path: Path) -> None:
    folder = config_file(tmp_path, vocab_size="many")
    assert monoblock.AutoConfig.from_pretrained(folder, vocab_size=61).vocab_size == 61


@pytest.mark.parametrize("model_type", [3, None, ["mistral"], {"a": 1}, ""], ids=str)
def test_an_invalid_model_type(tmp_path: Path, model_type: Any) -> None:
    with pytest.raises(ValueError, match=r"model_type|no family"):
        monoblock.AutoConfig.from_pretrained(config_file(tmp_path, model_type=model_type))
    if model_type:
        with pytest.raises(ValueError, match="reads checkpoints of type 'mistral'"):
            monoblock.MistralConfig.from_pretrained(tmp_path)


def test_floats_with_integer_values_become_integers(tmp_path: Path) -> None:
    fields = {name: float(value) for name, value in MISTRAL.items() if isinstance(value, int)}
    plain = monoblock.AutoConfig.from_pretrained(config_file(tmp_path))
    config = monoblock.AutoConfig.from_pretrained(config_file(tmp_path, **fields))
    assert config == plain
    assert config.to_spec() == plain.to_spec()
    assert type(config.vocab_size) is int


def test_fields_are_checked_at_construction_and_assignment() -> None:
    config = monoblock.MptConfig(d_model=64)
    for name in ("d_model", "hidden_size"):  # the second is an alias
        with pytest.raises(FieldError, match=r"MptConfig.d_model must be an integer, got '64'"):
            setattr(config, name, "64")
    with pytest.raises(FieldError, match=r"MptConfig.ffn_config.ffn_act_fn.name must be a string, got 3"):
        monoblock.MptConfig(ffn_config={"ffn_act_fn": {"name": 3}})
    with pytest.raises(FieldError, match=r"MptAttentionConfig.kv_n_heads must be an integer or None"):
        monoblock.MptConfig(attn_config={"kv_n_heads": "2"})
    with pytest.raises(FieldError, match=r"GPTNeoConfig.attention_types\[0\]\[1\] must be an integer"):
        monoblock.GPTNeoConfig(attention_types=[[["global"], "2"]])
    with pytest.raises(FieldError, match="attention_types must name at most 1024 layers, got 1000000000"):
        monoblock.GPTNeoConfig(attention_types=[[["global"], 10**9]], num_layers=10**9)
    with pytest.raises(FieldError, match=r"FuyuConfig.hidden_size must be an integer, got 'wide'"):
        monoblock.FuyuConfig(text_config={"hidden_size": "wide"})


ROPES: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0},
        "low_freq_factor below high_freq_factor",
    ),
    (
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1.0},
        "beta_fast, beta_slow and attention_factor above 0",
    ),
    ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "a theta above 1"),
    (
        {"rope_type": "yarn", "factor": 2.0, "mscale": -1.0, "mscale_all_dim": 1.0},
        "a positive mscale and mscale_all_dim",
    ),
]


@pytest.mark.parametrize(("rope", "message"), ROPES, ids=str)
def test_rope_scalings_that_divide_by_zero_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monoblock.MistralConfig(rope_parameters=rope).to_spec()


# ------------------------------------------------------------------ generation_config.json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number or None, got 'hot'"),
        ({"max_new_tokens": "20"}, "max_new_tokens must be an integer or None, got '20'"),
        ({"do_sample": 1}, "do_sample must be True or False or None, got 1"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id\[1\] must be an integer"),
        ({"bad_words_ids": [1]}, r"bad_words_ids\[0\] must be a list of integers, got 1"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty must be a list of 2"),
    ],
    ids=str,
)
def test_fields_of_generation_config_json_are_checked(tmp_path: Path, fields: Any, message: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(fields))
    named = f"^{re.escape(str(path))}: GenerationConfig.{message}"
    with pytest.raises(FieldError, match=named):
        monoblock.GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(FieldError, match=named):
        monoblock.GenerationConfig.from_json_file(path)


def test_floats_with_integer_values_in_generation_configs(tmp_path: Path) -> None:
    config = monoblock.GenerationConfig.from_dict({"max_new_tokens": 20.0, "temperature": 1})
    assert (config.max_new_tokens, config.temperature) == (20, 1)
    assert type(config.max_new_tokens) is int


# ------------------------------------------------------------------ JSON syntax and limits

REFUSED_JSON: list[tuple[bytes, str]] = [
    (b"[1]", "holds a JSON list; expected an object"),
    (b"", "is not valid JSON"),
    (b"{" * 100_000, "is not valid JSON"),
    (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "is nested more than 64 levels deep"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not valid JSON"),
    (b'{"a": [' + b"[]," * 4_000_000 + b"[]]}", "holds over 4,000,000 objects and lists"),
    (b'{"a": "' + b"x" * (64 << 20) + b'"}', "expected at most 67,108,864"),
    (b'{"a": "\\ud83d"}', "a lone surrogate"),
    (b'{"a": "\\ud83d\\ud83d\\ude00"}', "a lone surrogate"),
    (b'{"a": "\xff"}', "is not UTF-8 text"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED_JSON, ids=[message for _, message in REFUSED_JSON])
def test_refused_json(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_accepted_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(r'{"a": "\ud83d\ude00", "b": "\\ud83d", "c": [[[{}]]]}')
    assert read_json(path) == {"a": "😀", "b": "\\ud83d", "c": [[[{}]]]}
