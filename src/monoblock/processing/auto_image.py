"""`AutoImageProcessor`: chooses the image processor class of a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.field_types import brief
from monoblock.processing.files import pop_options, read_image_config
from monoblock.processing.image import FuyuImageProcessor

# Names in the files: model types with a processor, processors, and image processors.
MODEL_TYPES = ("fuyu",)
PROCESSORS = ("FuyuProcessor",)
_IMAGE_NAMES = ("FuyuImageProcessor", "FuyuImageProcessorFast", "FuyuImageProcessorPil")


class AutoImageProcessor:
    """Chooses the image processor class by `preprocessor_config.json` or `processor_config.json`."""

    def __init__(self) -> None:
        raise OSError("AutoImageProcessor has no constructor: call AutoImageProcessor.from_pretrained(name)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The image processor of a folder, a model on the hub or a JSON file; keywords as in the class's own."""
        path, settings, rest = read_image_config(pretrained_model_name_or_path, kwargs)
        # Fuyu's first files have no type, only the processor that the image processor belongs to.
        named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        if named is None and settings.get("processor_class") in PROCESSORS:
            named = _IMAGE_NAMES[0]
        if named is None:
            named = (
                _IMAGE_NAMES[0] if _model_type(pretrained_model_name_or_path, kwargs) in MODEL_TYPES else None
            )
        if named not in _IMAGE_NAMES:
            raise ValueError(
                f"{pretrained_model_name_or_path} asks for image_processor_type={brief(named)}; monoblock has: "
                + _IMAGE_NAMES[0]
            )
        return FuyuImageProcessor.from_file(path, settings, rest)


def _model_type(name: str | Path, kwargs: dict[str, Any]) -> Any:
    if Path(name).is_file():
        return None
    return content(name, "config.json", pop_options(dict(kwargs))).get("model_type")


def content(name: str | Path, file: str, options: HubOptions) -> dict[str, Any]:
    """A JSON file of a model; an empty dict without that file."""
    path = find_file(name, file, options, required=False)
    return {} if path is None else read_json(path)
