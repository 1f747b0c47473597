"""Recognise folders with a PEFT adapter but no model, and find the adapter's base model."""

from __future__ import annotations

from pathlib import Path

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.hub import find_file
from monoblock.checkpoint.journal import located
from monoblock.checkpoint.options import HubOptions

ADAPTER_CONFIG_NAME = "adapter_config.json"


def is_adapter(name: str | Path, hub: HubOptions) -> bool:
    """Whether a local folder holds an adapter and no model. False for names on the hub."""
    folder = Path(name) / hub.subfolder
    return located(folder, ADAPTER_CONFIG_NAME) is not None and located(folder, "config.json") is None


def base_of(name: str | Path, hub: HubOptions) -> str:
    """The base model named in an adapter's config. ValueError if there is none."""
    path = find_file(name, ADAPTER_CONFIG_NAME, hub)
    assert path is not None
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{name} holds an adapter whose {ADAPTER_CONFIG_NAME} names no base model: load the model itself, then "
            "load_adapter()"
        )
    return base
