"""GenerationConfig: files, validation, precedence, unsupported fields."""

import json
import logging

import pytest
from fakes import counting

from monoblock.errors import HubError, UnsupportedConfig
from monoblock.generation import GenerationConfig
from monoblock.generation.config import GENERATION_CONFIG_NAME
from monoblock.generation.resolve import NEEDS, UNSUPPORTED, new_tokens, resolve

HUB_FILE = {
    "_from_model_config": True,
    "eos_token_id": [0, 50278],
    "transformers_version": "4.31.0",
    "use_cache": False,
}


def write(folder, content):
    (folder / GENERATION_CONFIG_NAME).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_published_file_survives_a_round_trip(tmp_path):
    write(tmp_path, HUB_FILE)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_ids == (0, 50278)
    assert config.max_length is None
    out = tmp_path / "out"
    config.save_pretrained(out)
    assert json.loads((out / GENERATION_CONFIG_NAME).read_text()) == HUB_FILE
    assert [path.name for path in out.iterdir()] == [GENERATION_CONFIG_NAME]
    assert GenerationConfig.from_pretrained(out) == config


def test_unknown_fields_are_kept_and_logged_once(tmp_path, caplog):
    write(tmp_path, {"no_timestamps_token_id": 50363})
    config = GenerationConfig.from_pretrained(tmp_path)
    GenerationConfig.from_pretrained(tmp_path)
    assert caplog.text.count("no_timestamps_token_id") == 1
    assert config.no_timestamps_token_id == 50363
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / GENERATION_CONFIG_NAME).read_text()) == {"no_timestamps_token_id": 50363}


def test_overrides_and_unused_keywords(tmp_path):
    write(tmp_path, {"temperature": 0.5})
    config, unused = GenerationConfig.from_pretrained(tmp_path, top_k=3, foo=1, return_unused_kwargs=True)
    assert (config.temperature, config.top_k, unused) == (0.5, 3, {"foo": 1})
    assert not hasattr(config, "foo")
    assert config.update(top_p=0.5, bar=2) == {"bar": 2}
    assert config.top_p == 0.5
    assert GenerationConfig.from_pretrained(tmp_path, GENERATION_CONFIG_NAME).temperature == 0.5


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_broken_file_is_named(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=GENERATION_CONFIG_NAME):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(HubError, match=GENERATION_CONFIG_NAME):
        GenerationConfig.from_pretrained(tmp_path)


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="needs a folder"):
        GenerationConfig().save_pretrained(tmp_path / "x")


def test_an_invalid_value_is_not_saved(tmp_path):
    config = GenerationConfig()
    config.max_new_tokens = -1
    with pytest.raises(ValueError, match="max_new_tokens=-1: expected an integer of at least 1"):
        config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_of_files_are_validated_in_generate(tmp_path, caplog):
    write(tmp_path, {"top_p": 7, "temperature": 0.0, "max_new_tokens": 3, "top_k": -1})
    model = counting()
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    assert model.generate([[1]]).shape == (1, 4)  # greedy: sampling fields are unused
    assert caplog.text == ""
    model.generation_config.save_pretrained(tmp_path)  # published values can be saved again
    with pytest.raises(ValueError, match=r"top_k=-1|top_p=7|temperature=0"):
        model.generate([[1]], do_sample=True)


def test_equality_and_repr():
    assert GenerationConfig(top_k=1) == GenerationConfig(top_k=1) != GenerationConfig(top_k=2)
    assert repr(GenerationConfig(top_k=1)) == 'GenerationConfig {\n  "top_k": 1\n}\n'
    assert GenerationConfig().to_dict()["max_length"] is None
    with pytest.raises(TypeError):
        hash(GenerationConfig())


def test_sequence_bias_is_written_as_lists():
    config = GenerationConfig(sequence_bias={(1, 2): -1.0})
    assert config.to_diff_dict() == {"sequence_bias": [[[1, 2], -1.0]]}
    with pytest.raises(ValueError, match="sequence_bias"):
        GenerationConfig(sequence_bias=[[1, 2]])


def test_from_model_config_takes_generation_fields():
    fields = {"eos_token_id": 0, "pad_token_id": None, "use_cache": False, "d_model": 64, "max_length": 30}
    config = GenerationConfig.from_model_config(fields)
    assert config.set_fields() == {"eos_token_id": 0, "max_length": 30}
    assert config.to_diff_dict()["_from_model_config"] is True

    class ModelConfig:
        def to_dict(self):
            return fields

    assert GenerationConfig.from_model_config(ModelConfig()) == config


# ---------------------------------------------------------------------- precedence


def test_precedence_is_call_then_passed_config_then_model_then_default():
    model = GenerationConfig.from_dict(
        {"temperature": 0.1, "top_p": 0.1, "typical_p": 0.1, "do_sample": True}
    )
    passed = GenerationConfig(temperature=0.2, top_p=0.2)
    config = resolve({"temperature": 0.3}, passed, model)
    assert (config.temperature, config.top_p, config.typical_p, config.top_k) == (0.3, 0.2, 0.1, 50)
    assert (passed.typical_p, model.temperature) == (None, 0.1)  # neither is changed


def test_none_in_a_call_disables_a_field():
    model = GenerationConfig.from_dict(
        {"eos_token_id": 2, "do_sample": True, "temperature": 0.5, "max_new_tokens": 7}
    )
    config = resolve(
        {"eos_token_id": None, "top_k": None, "temperature": None, "max_length": None}, None, model
    )
    assert (config.eos_ids, config.top_k, config.temperature, config.max_new_tokens) == ((), None, None, 7)


@pytest.mark.parametrize(
    ("call", "file", "expected"),
    [
        ({"max_length": 30}, {"max_new_tokens": 256}, 20),  # the call takes precedence
        ({"max_new_tokens": 5}, {"max_length": 12}, 5),
        ({}, {"max_new_tokens": 6, "max_length": 12}, 6),
        ({}, {"max_length": 12}, 2),
    ],
)
def test_length_limits_of_calls_take_precedence_over_files(call, file, expected):
    config = resolve(call, None, GenerationConfig.from_dict(file))
    assert new_tokens(config, prompt_length=10) == expected


@pytest.mark.parametrize(
    ("call", "passed", "file", "expected"),
    [
        (None, None, {"use_cache": False}, True),
        (False, None, {}, False),
        (None, GenerationConfig(use_cache=False), {}, False),
        (None, GenerationConfig.from_dict({"use_cache": False}), {}, True),  # from_dict stands for a file
        (True, GenerationConfig(use_cache=False), {}, True),
    ],
)
def test_use_cache_false_of_files_is_ignored(call, passed, file, expected):
    arguments = {} if call is None else {"use_cache": call}
    assert resolve(arguments, passed, GenerationConfig.from_dict(file)).use_cache is expected


# ---------------------------------------------------------------------- tables


OTHER_VALUES = {bool: True, int: 3, float: 0.75}
STRING_FIELDS = ("dola_layers", "speculation_type")


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_every_unsupported_field_is_refused_in_call_and_file(name):
    allowed, _ = UNSUPPORTED[name]
    kind = type(allowed[0]) if allowed else str if name in STRING_FIELDS else int
    value = OTHER_VALUES.get(kind, "offloaded")
    with pytest.raises(UnsupportedConfig, match=f"^GenerationConfig.{name}={value!r}: "):
        resolve({name: value}, None, None)
    with pytest.raises(UnsupportedConfig, match=name):
        resolve({}, None, GenerationConfig.from_dict({name: value}))
    for fine in (*allowed, None):
        resolve({name: fine}, None, GenerationConfig.from_dict({name: fine}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.5), ("top_p", 0.5), ("top_k", 3), ("output_scores", True), ("length_penalty", 2.0)],
)
def test_fields_without_effect_are_logged_for_calls_only(field, value, caplog):
    assert field in NEEDS
    resolve({}, None, GenerationConfig.from_dict({field: value}))
    assert caplog.text == ""
    resolve({field: value}, None, None)
    assert f"{field}={value!r} has no effect without" in caplog.text


def test_fields_with_an_effect_are_not_logged(caplog):
    resolve({"do_sample": True, "temperature": 0.5, "top_k": 0}, None, None)
    resolve({"temperature": 0.5}, None, GenerationConfig.from_dict({"do_sample": True}))
    resolve({"temperature": 1.0, "do_sample": False, "output_scores": False}, None, None)
    assert caplog.text == ""


def test_max_length_with_max_new_tokens_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        resolve({"max_length": 9, "max_new_tokens": 3}, None, None)
    assert "max_new_tokens=3 decides" in caplog.text
