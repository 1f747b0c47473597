"""The `Auto...` classes: they read a checkpoint's config and choose the class that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import monoblock
from monoblock import families
from monoblock.config import PretrainedConfig


class AutoConfig:
    """Chooses the config class by a checkpoint's `model_type`."""

    def __init__(self) -> None:
        raise TypeError(
            "AutoConfig is not made directly: use AutoConfig.from_pretrained(name) or for_model(type)"
        )

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The config of a checkpoint, of the class of its family; keywords as in `PretrainedConfig`'s."""
        kwargs.pop("trust_remote_code", None)  # no remote code is ever run
        data, kwargs = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = data.get("model_type")
        if not model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: config.json names no model_type; monoblock has: "
                + ", ".join(sorted(families.FAMILIES))
            )
        return families.family(model_type).config.from_dict(data, **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> PretrainedConfig:
        """A config of that family with these fields."""
        return families.family(model_type).config(**kwargs)


class _AutoModel:
    """Chooses a model class by the checkpoint's config."""

    _prefix: ClassVar[str] = ""  # of this framework's class names

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} is not made directly: use {name}.from_pretrained(name) or from_config(config)"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """The model of a checkpoint; arguments as in the classes' own `from_pretrained`."""
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            hub = {k: kwargs[k] for k in _HUB if k in kwargs}
            source = pretrained_model_name_or_path if config is None else config
            config = kwargs["config"] = AutoConfig.from_pretrained(source, **hub)
        chosen = cls._class(config)
        return chosen.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        """A model of that config with random weights; keywords are those of the class's constructor."""
        return cls._class(config)(config, **kwargs)

    @classmethod
    def _class(cls, config: PretrainedConfig) -> Any:
        # The package's own attribute, which says what to install where a framework is missing.
        return getattr(monoblock, families.auto_class(cls.__name__, config, cls._prefix))


_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


class AutoModel(_AutoModel):
    """The bare model."""


class AutoModelForCausalLM(_AutoModel):
    """A model that predicts the next token."""


class AutoModelForSequenceClassification(_AutoModel):
    """A model that labels texts."""


class AutoModelForTokenClassification(_AutoModel):
    """A model that labels tokens."""


class AutoModelForQuestionAnswering(_AutoModel):
    """A model that finds a span."""


class AutoModelForMaskedLM(_AutoModel):
    """A model that fills in masked tokens."""


class AutoModelForMultipleChoice(_AutoModel):
    """A model that chooses among texts."""


class AutoModelForImageTextToText(_AutoModel):
    """A model that continues text about images."""


class _Flax(_AutoModel):
    _prefix = "Flax"


class FlaxAutoModel(_Flax):
    """The bare Flax model."""


class FlaxAutoModelForCausalLM(_Flax):
    """A Flax model that predicts the next token."""


class FlaxAutoModelForSequenceClassification(_Flax):
    """A Flax model that labels texts."""


class FlaxAutoModelForTokenClassification(_Flax):
    """A Flax model that labels tokens."""


class FlaxAutoModelForQuestionAnswering(_Flax):
    """A Flax model that finds a span."""


class FlaxAutoModelForMaskedLM(_Flax):
    """A Flax model that fills in masked tokens."""


class FlaxAutoModelForMultipleChoice(_Flax):
    """A Flax model that chooses among texts."""


class FlaxAutoModelForImageTextToText(_Flax):
    """A Flax model that continues text about images."""


class _TF(_AutoModel):
    _prefix = "TF"


class TFAutoModel(_TF):
    """The bare TensorFlow model."""


class TFAutoModelForCausalLM(_TF):
    """A TensorFlow model that predicts the next token."""


class TFAutoModelForSequenceClassification(_TF):
    """A TensorFlow model that labels texts."""


class TFAutoModelForTokenClassification(_TF):
    """A TensorFlow model that labels tokens."""


class TFAutoModelForQuestionAnswering(_TF):
    """A TensorFlow model that finds a span."""


class TFAutoModelForMaskedLM(_TF):
    """A TensorFlow model that fills in masked tokens."""


class TFAutoModelForMultipleChoice(_TF):
    """A TensorFlow model that chooses among texts."""


class TFAutoModelForImageTextToText(_TF):
    """A TensorFlow model that continues text about images."""
