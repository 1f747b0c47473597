"""`AutoProcessor`: chooses the processor class of a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monoblock.processing.auto_image import MODEL_TYPES, PROCESSORS, content
from monoblock.processing.files import IMAGE_FILE, pop_options, read_processor_config
from monoblock.processing.processor import FuyuProcessor


class AutoProcessor:
    """Loads a model's processor, or its tokenizer if the model takes text alone."""

    def __init__(self) -> None:
        raise OSError("AutoProcessor has no constructor: call AutoProcessor.from_pretrained(name)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The processor of a folder or of a model on the hub; keywords as in the class's own `from_pretrained`.

        The class is that of `processor_class` in the files, else that of the `model_type` of `config.json`. ValueError
        for an unknown processor.
        """
        from monoblock.tokenization import AutoTokenizer

        name = pretrained_model_name_or_path
        options = pop_options(dict(kwargs))
        asked = read_processor_config(name, options).get("processor_class")
        for file in (IMAGE_FILE, "tokenizer_config.json"):
            if asked is None:
                asked = content(name, file, options).get("processor_class")
        if asked is None and content(name, "config.json", options).get("model_type") in MODEL_TYPES:
            asked = PROCESSORS[0]
        if asked in PROCESSORS:
            return FuyuProcessor.from_pretrained(name, **kwargs)
        if asked is None:
            return AutoTokenizer.from_pretrained(name, **kwargs)
        raise ValueError(f"{name} asks for processor_class={asked!r}; monoblock has: {', '.join(PROCESSORS)}")
