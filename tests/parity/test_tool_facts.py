"""Attributes of configs that tools read, and transformers' config objects passed to our classes."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy
import pytest
import tiny_families
import torch
import transformers

import monoblock
from monoblock.config import PretrainedConfig, as_own_config
from monoblock.families import FAMILIES, class_names

STEMS = {model_type: stem for model_type, (stem, _) in FAMILIES.items()}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 89, "attn_config": {"clip_qkv": 0.5}}


def theirs(model_type: str, **more: Any) -> Any:
    """transformers' tiny config object of a family."""
    fields = MPT | more if model_type == "mpt" else tiny_families.fields(model_type, **more)
    return getattr(transformers, STEMS[model_type] + "Config")(**fields)


def ours(model_type: str) -> type[PretrainedConfig]:
    return getattr(monoblock, STEMS[model_type] + "Config")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parallel_plans_are_transformers(model_type: str) -> None:
    there, here = type(theirs(model_type)), ours(model_type)
    for name in ("base_model_tp_plan", "base_model_pp_plan"):
        assert getattr(here, name) == getattr(there, name), name
    # the default of transformers' Trainer for configs without this attribute
    assert here.keys_to_ignore_at_inference == getattr(
        there, "keys_to_ignore_at_inference", ["past_key_values"]
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attributes_of_configs(model_type: str) -> None:
    config = ours(model_type).from_dict({**theirs(model_type).to_dict(), "_name_or_path": "some/name"})
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config
    assert config.get_text_config(decoder=False, encoder=True) is config
    names = list(config)
    assert {"vocab_size", "id2label", "tie_word_embeddings"} <= set(names)
    assert "vocab_size" in config and "no_such_field" not in config
    assert not [name for name in names if name.startswith("_")]
    assert ("hidden_size" in config) == ("hidden_size" in theirs(model_type)) or model_type == "fuyu"
    assert config._name_or_path == config.name_or_path == config.to_dict()["_name_or_path"] == "some/name"
    assert "_name_or_path" not in config.to_diff_dict()
    config._name_or_path = "other"
    assert config.name_or_path == "other"
    assert config.is_encoder_decoder is False and config.use_return_dict is True


def test_names_do_not_affect_equality_and_uploads_raise(tmp_path: Any) -> None:
    assert monoblock.MptConfig(name_or_path="a") == monoblock.MptConfig(name_or_path="b")
    assert "_name_or_path" not in monoblock.MptConfig().to_dict()["attn_config"]
    with pytest.raises(NotImplementedError, match="hf upload me/mine"):
        monoblock.MptConfig().push_to_hub("me/mine")
    with pytest.raises(NotImplementedError, match="push_to_hub"):
        monoblock.MptConfig().save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_config_object_equals_its_file(
    model_type: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = theirs(model_type, name_or_path="some/name", problem_type="regression")
    with caplog.at_level(logging.WARNING, "monoblock"):
        read = as_own_config(config, ours(model_type))
    assert not caplog.records, "an unknown field"
    config.save_pretrained(tmp_path)
    from_file = ours(model_type).from_pretrained(tmp_path)
    assert read == from_file
    assert read.to_spec() == from_file.to_spec()
    assert read.name_or_path == "some/name"
    assert read.problem_type == "regression"


AUTO = {"mpnet": "AutoModelForMaskedLM", "fuyu": "AutoModelForImageTextToText"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_config_with_a_transformers_config(model_type: str) -> None:
    config = theirs(model_type)
    auto = getattr(monoblock, AUTO.get(model_type, "AutoModelForCausalLM"))
    made = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=True)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.config.dtype == "bfloat16"
    assert made.config._attn_implementation == "eager" and config._attn_implementation != "eager"
    assert made(torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    base = getattr(monoblock, STEMS[model_type] + "PreTrainedModel")
    assert isinstance(made, base) and isinstance(made, monoblock.PreTrainedModel)
    assert not issubclass(monoblock.MptModel if model_type != "mpt" else monoblock.MistralModel, base)


def test_dtype_of_from_config() -> None:
    config = monoblock.MptConfig(**MPT, dtype="float16")
    assert monoblock.AutoModel.from_config(config).dtype == torch.float16
    assert monoblock.AutoModel.from_config(config, torch_dtype="bfloat16").dtype == torch.bfloat16
    assert monoblock.AutoModel.from_config(monoblock.MptConfig(**MPT)).dtype == torch.float32
    assert config.dtype == "float16", "the given config is not modified"
    with pytest.raises(ValueError, match="two names of one setting"):
        monoblock.AutoModel.from_config(config, dtype="float16", torch_dtype="float32")
    with pytest.raises(ValueError, match="dtype='int8'"):
        monoblock.AutoModel.from_config(config, dtype="int8")


def test_from_config_names_unknown_arguments() -> None:
    config = monoblock.MptConfig(**MPT)
    with pytest.raises(
        ValueError, match=r"AutoModel.from_config does not know the argument 'speed'; it takes: dtype"
    ):
        monoblock.AutoModel.from_config(config, speed=1)
    with pytest.raises(ValueError, match=r"FlaxAutoModel.from_config does not know .* 'attn_implementation'"):
        monoblock.FlaxAutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"TFAutoModel.from_config does not know the argument 'torch_dtype'"):
        monoblock.TFAutoModel.from_config(config, torch_dtype="float32")
    with pytest.raises(ValueError, match="no family 'bert'"):
        monoblock.AutoModel.from_config(transformers.BertConfig())
    with pytest.raises(ValueError, match=r"expected a config.*got str"):
        monoblock.AutoModel.from_config("mpt")


def test_from_pretrained_with_a_transformers_config(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    monoblock.AutoModelForCausalLM.from_config(monoblock.MptConfig(**MPT)).save_pretrained(folder)
    config = theirs("mpt", num_labels=3)
    made = monoblock.AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    assert made.config.num_labels == 3 and type(made.config) is monoblock.MptConfig


@pytest.mark.parametrize("prefix", ["Flax", "TF"])
def test_flax_and_tf_classes_with_a_transformers_config(prefix: str, tmp_path: Any) -> None:
    config = theirs("mpt")
    made = getattr(monoblock, prefix + "MptModel")(config)
    assert type(made.config) is monoblock.MptConfig
    assert getattr(monoblock, prefix + "AutoModel").from_config(config).config == made.config
    made.save_pretrained(tmp_path)
    again = getattr(monoblock, prefix + "MptModel").from_pretrained(tmp_path, config=config)
    assert again.config.attn_config.clip_qkv == 0.5
    with pytest.raises(ValueError, match=f"{prefix}MptModel|MptModel takes a MptConfig, got BertConfig"):
        getattr(monoblock, prefix + "MptModel")(transformers.BertConfig())


def test_configs_of_other_families_raise() -> None:
    for wrong in (transformers.BertConfig(), monoblock.MptConfig(), 3, {"model_type": "mistral"}, None):
        with pytest.raises(
            ValueError, match=f"MistralModel takes a MistralConfig, got {type(wrong).__name__}"
        ):
            as_own_config(wrong, monoblock.MistralConfig, "MistralModel")


def test_base_classes_cannot_be_instantiated() -> None:
    with pytest.raises(TypeError, match="MptPreTrainedModel is only the base of MptModel, MptForCausalLM"):
        monoblock.MptPreTrainedModel(monoblock.MptConfig(**MPT))
    for model_type, stem in STEMS.items():
        base = getattr(monoblock, stem + "PreTrainedModel")
        assert base.config_class is ours(model_type)
        assert all(issubclass(getattr(monoblock, name), base) for name in class_names(model_type))


def test_set_seed_is_transformers() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    transformers.set_seed(11)
    wanted = draws()
    monoblock.set_seed(11)
    assert draws() == wanted
