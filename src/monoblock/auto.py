"""The `Auto...` classes, which select a class by a checkpoint's config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import monoblock
from monoblock import families
from monoblock.checkpoint.adapter_files import base_of, is_adapter
from monoblock.checkpoint.options import HubOptions, pop_remote_code
from monoblock.config import PretrainedConfig, as_own_config
from monoblock.config_tools import foreign_fields
from monoblock.field_types import checked, in_file


class AutoConfig:
    """Selects the config class by `model_type`."""

    def __init__(self) -> None:
        raise TypeError(
            "AutoConfig cannot be instantiated: use AutoConfig.from_pretrained(name) or for_model(type)"
        )

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The config of a checkpoint, in the class of its family; arguments as in
        `PretrainedConfig.from_pretrained`."""
        path, data = PretrainedConfig.read_file(pretrained_model_name_or_path, HubOptions.pop(kwargs))
        with in_file(path, kwargs):
            model_type = checked("config", "model_type", data.get("model_type"), str | None)
            if not model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: config.json has no model_type; monoblock supports: "
                    + ", ".join(sorted(families.FAMILIES))
                )
            return families.family(model_type).config.from_dict(data, **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> PretrainedConfig:
        """A new config of that family with these fields."""
        return families.family(model_type).config(**kwargs)


class _AutoModel:
    """Selects a model class by the config."""

    _prefix: ClassVar[str] = ""  # of this framework's class names
    # Keyword arguments of `from_config`.
    _arguments: ClassVar[tuple[str, ...]] = ("dtype", "torch_dtype", "attn_implementation")

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be instantiated: use {name}.from_pretrained(name) or from_config(config)"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """The model of a checkpoint; arguments as in `from_pretrained` of the model classes."""
        config = kwargs.get("config")
        if config is None or isinstance(config, str | Path):
            hub = {k: kwargs[k] for k in _HUB if k in kwargs}
            source = pretrained_model_name_or_path if config is None else config
            if config is None and not cls._prefix and is_adapter(source, HubOptions(**hub)):
                source = base_of(source, HubOptions(**hub))
            config = AutoConfig.from_pretrained(source, **hub)
        kwargs["config"] = config = own_config(config)
        chosen = cls._class(config)
        return chosen.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights from a config of monoblock or transformers.

        Keyword arguments in PyTorch: `dtype` (or `torch_dtype`; default: the config's, else PyTorch's) and
        `attn_implementation`; in other frameworks, those of the class's constructor. `trust_remote_code` has no effect:
        remote code is never run. ValueError: other keyword arguments, or a config of an unsupported family.
        """
        pop_remote_code(kwargs)
        config = own_config(config)
        chosen = cls._class(config)
        if unknown := next((name for name in kwargs if name not in cls._arguments), None):
            known = ", ".join((*cls._arguments, "trust_remote_code"))
            raise ValueError(
                f"{cls.__name__}.from_config does not know the argument {unknown!r}; it takes: {known}"
            )
        make = chosen if cls._prefix else chosen._from_config
        return make(config, **kwargs)

    @classmethod
    def _class(cls, config: PretrainedConfig) -> Any:
        # By the package's attribute, whose error names the pip extra if a framework is missing.
        return getattr(monoblock, families.auto_class(cls.__name__, config, cls._prefix))


def own_config(config: Any) -> PretrainedConfig:
    """A config of a supported family: the given one, or converted from transformers' config; else ValueError."""
    if isinstance(config, PretrainedConfig):
        return config
    fields = foreign_fields(config)
    if fields is None:
        raise ValueError(f"expected a config of monoblock or transformers, got {type(config).__name__}")
    return as_own_config(config, families.family(fields["model_type"]).config)


_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "gguf_file")


class AutoModel(_AutoModel):
    """The bare model."""


class AutoModelForCausalLM(_AutoModel):
    """A model with a causal language modeling head."""


class AutoModelForSequenceClassification(_AutoModel):
    """A model with a sequence classification head."""


class AutoModelForTokenClassification(_AutoModel):
    """A model with a token classification head."""


class AutoModelForQuestionAnswering(_AutoModel):
    """A model with an extractive question answering head."""


class AutoModelForMaskedLM(_AutoModel):
    """A model with a masked language modeling head."""


class AutoModelForMultipleChoice(_AutoModel):
    """A model with a multiple choice head."""


class AutoModelForImageTextToText(_AutoModel):
    """A model that generates text from images and text."""


class _Flax(_AutoModel):
    _prefix = "Flax"
    _arguments = ("input_shape", "seed", "dtype", "_do_init", "gradient_checkpointing")


class FlaxAutoModel(_Flax):
    """The bare Flax model."""


class FlaxAutoModelForCausalLM(_Flax):
    """A Flax model with a causal language modeling head."""


class FlaxAutoModelForSequenceClassification(_Flax):
    """A Flax model with a sequence classification head."""


class FlaxAutoModelForTokenClassification(_Flax):
    """A Flax model with a token classification head."""


class FlaxAutoModelForQuestionAnswering(_Flax):
    """A Flax model with an extractive question answering head."""


class FlaxAutoModelForMaskedLM(_Flax):
    """A Flax model with a masked language modeling head."""


class FlaxAutoModelForMultipleChoice(_Flax):
    """A Flax model with a multiple choice head."""


class FlaxAutoModelForImageTextToText(_Flax):
    """A Flax model that generates text from images and text."""


class ModelMapping(Mapping[type[PretrainedConfig], type[Any]]):
    """Config class -> the model class that an `AutoModel...` selects for it. The framework is imported when a value is
    read."""

    def __init__(self, auto: str, prefix: str) -> None:
        self._prefix = prefix
        self._names = {kind: families.auto_name(auto, kind) for kind in families.FAMILIES}

    def __iter__(self) -> Iterator[type[PretrainedConfig]]:
        return (families.family(kind).config for kind, name in self._names.items() if name is not None)

    def __len__(self) -> int:
        return sum(name is not None for name in self._names.values())

    def __contains__(self, key: object) -> bool:
        return any(key is config for config in self)

    def __getitem__(self, key: type[PretrainedConfig]) -> type[Any]:
        if key not in self:
            raise KeyError(key)
        return getattr(monoblock, f"{self._prefix}{self._names[key.model_type]}")


FLAX_MODEL_MAPPING = ModelMapping("AutoModel", "Flax")
FLAX_MODEL_FOR_CAUSAL_LM_MAPPING = ModelMapping("AutoModelForCausalLM", "Flax")
FLAX_MODEL_FOR_MASKED_LM_MAPPING = ModelMapping("AutoModelForMaskedLM", "Flax")
FLAX_MODEL_FOR_MULTIPLE_CHOICE_MAPPING = ModelMapping("AutoModelForMultipleChoice", "Flax")
FLAX_MODEL_FOR_QUESTION_ANSWERING_MAPPING = ModelMapping("AutoModelForQuestionAnswering", "Flax")
FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING = ModelMapping("AutoModelForSequenceClassification", "Flax")
FLAX_MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING = ModelMapping("AutoModelForTokenClassification", "Flax")


class _TF(_AutoModel):
    _prefix = "TF"
    _arguments = ("name", "dtype", "trainable")


class TFAutoModel(_TF):
    """The bare TensorFlow model."""


class TFAutoModelForCausalLM(_TF):
    """A TensorFlow model with a causal language modeling head."""


class TFAutoModelForSequenceClassification(_TF):
    """A TensorFlow model with a sequence classification head."""


class TFAutoModelForTokenClassification(_TF):
    """A TensorFlow model with a token classification head."""


class TFAutoModelForQuestionAnswering(_TF):
    """A TensorFlow model with an extractive question answering head."""


class TFAutoModelForMaskedLM(_TF):
    """A TensorFlow model with a masked language modeling head."""


class TFAutoModelForMultipleChoice(_TF):
    """A TensorFlow model with a multiple choice head."""


class TFAutoModelForImageTextToText(_TF):
    """A TensorFlow model that generates text from images and text."""
