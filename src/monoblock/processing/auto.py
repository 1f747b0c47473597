"""`AutoProcessor` and `AutoImageProcessor`: the classes that a model's files ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.processing.files import IMAGE_FILE, pop_options, read_image_config, read_processor_config

# What files say: model types with a processor, and the names of image processors and processors.
_MODEL_TYPES = ("fuyu",)
_IMAGE_NAMES = ("FuyuImageProcessor", "FuyuImageProcessorFast", "FuyuImageProcessorPil")
_NAMES = ("FuyuProcessor",)


class AutoImageProcessor:
    """Chooses the image processor class by `preprocessor_config.json` or `processor_config.json`."""

    def __init__(self) -> None:
        raise OSError("AutoImageProcessor has no constructor: call AutoImageProcessor.from_pretrained(name)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The image processor of a folder, a model on the hub or a JSON file; keywords as in the class's own."""
        from monoblock.processing.image import FuyuImageProcessor

        settings, rest = read_image_config(pretrained_model_name_or_path, kwargs)
        # Fuyu's first files name no type, only the processor that the image processor belongs to.
        named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        if named is None and settings.get("processor_class") in _NAMES:
            named = _IMAGE_NAMES[0]
        if named is None:
            named = (
                _IMAGE_NAMES[0]
                if _model_type(pretrained_model_name_or_path, kwargs) in _MODEL_TYPES
                else None
            )
        if named not in _IMAGE_NAMES:
            raise ValueError(
                f"{pretrained_model_name_or_path} asks for image_processor_type={named!r}; monoblock has: "
                + _IMAGE_NAMES[0]
            )
        return FuyuImageProcessor.from_dict(settings, rest)


class AutoProcessor:
    """Chooses what turns a user's inputs into a model's: a processor, or the tokenizer of a model of text alone."""

    def __init__(self) -> None:
        raise OSError("AutoProcessor has no constructor: call AutoProcessor.from_pretrained(name)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The processor of a folder or of a model on the hub; keywords as in the class's own `from_pretrained`.

        By `processor_class` in the files, then by the `model_type` of `config.json`. ValueError for a processor that
        is not known.
        """
        from monoblock.processing.processor import FuyuProcessor
        from monoblock.tokenization import AutoTokenizer

        name = pretrained_model_name_or_path
        options = pop_options(dict(kwargs))
        asked = read_processor_config(name, options).get("processor_class")
        for file in (IMAGE_FILE, "tokenizer_config.json"):
            if asked is None:
                asked = _content(name, file, options).get("processor_class")
        if asked is None and _content(name, "config.json", options).get("model_type") in _MODEL_TYPES:
            asked = _NAMES[0]
        if asked in _NAMES:
            return FuyuProcessor.from_pretrained(name, **kwargs)
        if asked is None:
            return AutoTokenizer.from_pretrained(name, **kwargs)
        raise ValueError(f"{name} asks for processor_class={asked!r}; monoblock has: {', '.join(_NAMES)}")


def _model_type(name: str | Path, kwargs: dict[str, Any]) -> Any:
    if Path(name).is_file():
        return None
    return _content(name, "config.json", pop_options(dict(kwargs))).get("model_type")


def _content(name: str | Path, file: str, options: HubOptions) -> dict[str, Any]:
    path = find_file(name, file, options, required=False)
    return {} if path is None else read_json(path)
