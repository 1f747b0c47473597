"""What a checkpoint is served as: text generation, vectors, or scores."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Any

from monoblock import demo_embeddings
from monoblock.checkpoint.adapter_files import base_of, is_adapter
from monoblock.checkpoint.contents import SENTENCE_TRANSFORMERS
from monoblock.checkpoint.hub import HubOptions, find_file

log = logging.getLogger("monoblock")


class ModelKind(StrEnum):
    """The kinds of served models."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"


GENERATING = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
CLASSIFYING = ("ForSequenceClassification",)
EMBEDDING = ("Model", "ForMaskedLM")


def detect(source: str, hub: dict[str, Any]) -> ModelKind:
    """The kind of a folder or a repository, by modules.json or else by config.json's architectures.

    ValueError for a class that is not served, such as token classification.
    """
    if source == demo_embeddings.NAME and not Path(source).exists():
        return ModelKind.EMBED
    options = HubOptions(**hub)
    if is_adapter(source, options):
        return detect(base_of(source, options), {})
    if find_file(source, SENTENCE_TRANSFORMERS, options, required=False) is not None:
        from monoblock.embeddings.files import read_settings

        kind = read_settings(source, options).model_type
        return ModelKind.CLASSIFY if kind == "CrossEncoder" else ModelKind.EMBED
    from monoblock.auto import AutoConfig
    from monoblock.families import AUTO, class_names, family

    config = AutoConfig.from_pretrained(source, **hub)
    names = [name.lower() for name in config.architectures or ()]
    for endings, kind in (
        (GENERATING, ModelKind.GENERATE),
        (CLASSIFYING, ModelKind.CLASSIFY),
        (EMBEDDING, ModelKind.EMBED),
    ):
        if any(name.endswith(tuple(map(str.lower, endings))) for name in names):
            return kind
    if names:
        raise ValueError(
            f"{source}: the class {config.architectures[0]} is not served; served are language models, embedding "
            "models and sequence classifiers"
        )
    own = class_names(family(config.model_type).name)
    causal = any(name.endswith(AUTO["AutoModelForCausalLM"]) for name in own)
    return ModelKind.GENERATE if causal else ModelKind.EMBED


def default_name(source: str | None) -> str:
    """The name under which a model is served: of a folder or a file its last component, else the name on the hub."""
    if source is None:
        return "demo"
    folder = Path(source).expanduser()
    return folder.resolve().name or source if folder.exists() else source
