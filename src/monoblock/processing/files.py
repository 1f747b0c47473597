"""The files of processors: read from a folder or the hub, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.files import staged
from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.errors import HubError

IMAGE_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # newer; may hold the image processor's settings as well

# Arguments of transformers that have no effect here.
_NO_EFFECT = ("use_fast", "backend", "code_revision", "_from_auto", "_commit_hash")


def pop_options(kwargs: dict[str, Any]) -> HubOptions:
    """Pop the download options from `kwargs`, in place, and drop the arguments without effect."""
    for name in _NO_EFFECT:
        kwargs.pop(name, None)
    return HubOptions.pop(kwargs)


def read_image_config(
    name: str | Path, kwargs: Mapping[str, Any], options: HubOptions | None = None
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The path of the image processor's config in a folder or on the hub, its settings, and the remaining keywords.

    `HubError` if neither `preprocessor_config.json` nor `processor_config.json` has any.
    """
    rest = dict(kwargs)
    options = pop_options(rest) if options is None else options
    if Path(name).is_file():
        return Path(name), read_json(Path(name)), rest
    path = find_file(name, PROCESSOR_FILE, options, required=False)
    nested = None if path is None else read_json(path).get("image_processor")
    # Takes precedence over a preprocessor_config.json, as in transformers.
    if path is not None and isinstance(nested, dict):
        return path, cast("dict[str, Any]", nested), rest
    path = find_file(name, IMAGE_FILE, options, required=False)
    if path is None:
        raise HubError(
            f"{name} has no image processor: expected {IMAGE_FILE}, or settings in {PROCESSOR_FILE}"
        )
    return path, read_json(path), rest


def read_processor_config(name: str | Path, options: HubOptions) -> dict[str, Any]:
    """The content of `processor_config.json`; {} if it is missing."""
    path = find_file(name, PROCESSOR_FILE, options, required=False)
    return {} if path is None else read_json(path)


def image_files(folder: str | Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of an image processor in a folder: name -> content."""
    files = {IMAGE_FILE: settings}
    other = Path(folder) / PROCESSOR_FILE
    if other.is_file() and "image_processor" in (content := read_json(other)):
        files[PROCESSOR_FILE] = {**content, "image_processor": settings}
    return files


def write_json(folder: str | Path, files: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write JSON files, all of them or none; returns their paths."""
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; save_pretrained needs a folder")
    with staged(folder) as stage:
        for name, content in files.items():
            stage.write(name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return [Path(folder) / name for name in files]
