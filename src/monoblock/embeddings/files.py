"""The files of a sentence-transformers folder: modules.json and the configs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import monoblock
from monoblock.checkpoint.contents import SENTENCE_TRANSFORMERS
from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.checkpoint.json_text import parsed
from monoblock.errors import CheckpointError
from monoblock.field_types import checked

FORMAT = "3.0.0"  # the first version of the package that reads all keys that are written here
CONFIG = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
# The transformer module's config, and its older names.
TRANSFORMER_NAMES = (
    TRANSFORMER,
    *(
        f"sentence_{name}_config.json"
        for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)


@dataclass(frozen=True)
class Entry:
    """A module of modules.json: its class path and its folder."""

    type: str
    folder: str


@dataclass
class ModelSettings:
    """The content of config_sentence_transformers.json, as far as it has an effect here."""

    model_type: str = "SentenceTransformer"
    prompts: dict[str, str] = field(default_factory=dict[str, str])
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None
    truncate_dim: int | None = None
    activation_fn: str | None = None
    versions: dict[str, Any] = field(default_factory=dict[str, Any])


def inside(options: HubOptions, folder: str) -> HubOptions:
    """The options for a folder of the model."""
    return replace(options, subfolder="/".join(part for part in (options.subfolder, folder) if part))


def read_entries(name: str | Path, options: HubOptions) -> list[Entry] | None:
    """The modules of a folder or repository; None if it has no modules.json."""
    path = find_file(name, SENTENCE_TRANSFORMERS, options, required=False)
    if path is None:
        return None
    content = parsed(path.read_bytes(), path)
    if not isinstance(content, list) or not content:
        raise CheckpointError(f"{path} holds no list of modules")
    entries: list[Entry] = []
    for item in cast(list[Any], content):
        found = cast(dict[str, Any], item) if isinstance(item, dict) else {}
        kind, folder = found.get("type"), found.get("path")
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise CheckpointError(f"{path}: each module needs a type and a path, got {item!r}")
        if found.get("kwargs"):
            raise CheckpointError(f"{path}: kwargs of the module {folder or kind!r} are not supported")
        entries.append(Entry(kind, folder))
    return entries


def read_settings(name: str | Path, options: HubOptions) -> ModelSettings:
    """The settings of the whole model; the defaults without the file."""
    path = find_file(name, CONFIG, options, required=False)
    if path is None:
        return ModelSettings()
    content = read_json(path)

    def value(key: str, kind: Any, default: Any = None) -> Any:
        found = content.get(key)
        return default if found is None else checked(path.name, key, found, kind)

    prompts = {key: text or "" for key, text in value("prompts", dict[str, str | None], {}).items()}
    return ModelSettings(
        model_type=value("model_type", str, "SentenceTransformer"),
        prompts=prompts,
        default_prompt_name=value("default_prompt_name", str),
        similarity_fn_name=value("similarity_fn_name", str),
        truncate_dim=value("truncate_dim", int),
        activation_fn=value("activation_fn", str),
        versions=value("__version__", dict[str, Any], {}),
    )


def read_transformer(name: str | Path, options: HubOptions) -> tuple[dict[str, Any], Path | None]:
    """The transformer module's config, under any of its names, and its path."""
    for filename in TRANSFORMER_NAMES:
        if (path := find_file(name, filename, options, required=False)) is not None:
            return read_json(path), path
    return {}, None


def check_keys(config: Mapping[str, Any], known: Collection[str], path: Path) -> None:
    """CheckpointError for a key that has no effect here."""
    if unknown := [key for key in config if key not in known]:
        raise CheckpointError(f"{path}: the key {unknown[0]!r} is not supported")


def as_json(content: Any) -> str:
    """JSON text, indented."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """The versions that config_sentence_transformers.json names: of the format, and of the writer."""
    return {"sentence_transformers": FORMAT, "monoblock": monoblock.__version__}
