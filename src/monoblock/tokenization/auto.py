"""`AutoTokenizer`: chooses the tokenizer class of a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monoblock.checkpoint.gguf.header import read_gguf
from monoblock.checkpoint.hub import HubOptions, find_file, find_gguf, in_gguf, read_json
from monoblock.field_types import checked_fields, in_file
from monoblock.tokenization import gguf
from monoblock.tokenization.classes import CLASSES, LlamaTokenizer, by_model_type, by_name
from monoblock.tokenization.fast import PreTrainedTokenizerFast
from monoblock.tokenization.files import BACKEND_FILE, is_vocabulary, read_config
from monoblock.tokenization.llama import FILES

# Fields of config.json that determine the tokenizer class.
_KINDS = {"tokenizer_class": str | None, "model_type": str | None}


class AutoTokenizer:
    """Loads a tokenizer by `tokenizer_config.json`, then by `config.json`, else with the generic class."""

    def __init__(self) -> None:
        raise OSError("AutoTokenizer has no constructor: call AutoTokenizer.from_pretrained(name)")

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        config: Any = None,
        tokenizer_type: str | None = None,
        **kwargs: Any,
    ) -> PreTrainedTokenizerFast:
        """The tokenizer of a folder, of a model on the hub, or of one file (`tokenizer.json`, `.model`, `tekken.json`).

        Args:
            config: a model config, whose `model_type` overrides that of `config.json`.
            tokenizer_type: a `model_type`; overrides the files.
            kwargs: as in `PreTrainedTokenizerFast.from_pretrained`.
        """
        chosen = _choose(pretrained_model_name_or_path, config, tokenizer_type, kwargs)
        return chosen.from_pretrained(pretrained_model_name_or_path, **kwargs)


def _choose(
    name: str | Path, config: Any, tokenizer_type: str | None, kwargs: dict[str, Any]
) -> type[PreTrainedTokenizerFast]:
    if tokenizer_type is not None:
        if (chosen := by_model_type(tokenizer_type)) is not None:
            return chosen
        raise ValueError(f"tokenizer_type={tokenizer_type!r} is not known; {_known()}")
    options = HubOptions.pop(dict(kwargs))
    if in_gguf(name, options):
        chosen = by_name(gguf.class_name(read_gguf(find_gguf(name, options)[0])))
        assert chosen is not None
        return chosen
    if Path(name).is_file():
        return LlamaTokenizer if is_vocabulary(name) else PreTrainedTokenizerFast
    class_name, model_type = (
        read_config(name, options).get("tokenizer_class"),
        getattr(config, "model_type", None),
    )
    if class_name is None or model_type is None:
        path = find_file(name, "config.json", options, required=False) if config is None else None
        content: dict[str, Any] = {}
        if path is not None:
            with in_file(path):
                content = checked_fields("config", read_json(path), _KINDS)
        class_name, model_type = (
            class_name or content.get("tokenizer_class"),
            model_type or content.get("model_type"),
        )
    chosen = by_name(class_name) if class_name else by_model_type(model_type) if model_type else None
    if chosen is not None:
        return chosen
    if kwargs.keys() & {"tokenizer_object", "tokenizer_file"} or find_file(
        name, BACKEND_FILE, options, required=False
    ):
        return PreTrainedTokenizerFast
    if any(find_file(name, file, options, required=False) for file in FILES):
        return LlamaTokenizer  # the only reader of these files, for any model type
    asked = f"tokenizer_class={class_name!r}" if class_name else f"model_type={model_type!r}"
    raise ValueError(
        f"{name} asks for {asked}, which is not known, and has no {BACKEND_FILE} to load instead; {_known()}"
    )


def _known() -> str:
    classes = ", ".join(name for cls in CLASSES for name in cls.family.names)
    types = ", ".join(name for cls in CLASSES for name in cls.family.model_types)
    return f"known classes: {classes}; known model types: {types}"
