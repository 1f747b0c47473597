"""Folders that hold an adapter of the peft package, and no model of its own."""

from __future__ import annotations

from pathlib import Path

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.hub import find_file
from monoblock.checkpoint.journal import located
from monoblock.checkpoint.options import HubOptions

ADAPTER_CONFIG_NAME = "adapter_config.json"


def is_adapter(name: str | Path, hub: HubOptions) -> bool:
    """Whether a folder holds an adapter and no model. A name on the hub is taken for a model."""
    folder = Path(name) / hub.subfolder
    return located(folder, ADAPTER_CONFIG_NAME) is not None and located(folder, "config.json") is None


def base_of(name: str | Path, hub: HubOptions) -> str:
    """The model that an adapter was made for, as its file names it. ValueError if it names none."""
    path = find_file(name, ADAPTER_CONFIG_NAME, hub)
    assert path is not None
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{name} holds an adapter whose {ADAPTER_CONFIG_NAME} names no base model: load the model itself, then "
            "load_adapter()"
        )
    return base
