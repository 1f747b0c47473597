"""Read llm-foundry's MPT checkpoints: exported folders of class `MPTForCausalLM`, and Composer checkpoints (.pt files).

Source: https://github.com/mosaicml/llm-foundry (configuration_mpt.py) and Composer's HuggingFaceModel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.formats import Checkpoint, Format, assembled, causal_class, companions
from monoblock.checkpoint.hub import HubOptions, find_file, find_weights
from monoblock.checkpoint.pickles import flat_tensors, unpickled
from monoblock.checkpoint.store import open_store
from monoblock.checkpoint.upstream.pickled import PickledTensors
from monoblock.checkpoint.weights import RenamedTensors, Tensors
from monoblock.errors import CheckpointError
from monoblock.families.mpt import MptConfig
from monoblock.families.mpt import keymap as mpt_keymap

# llm-foundry's defaults that differ from transformers', for fields that a config omits.
DEFAULTS: dict[str, Any] = {"no_bias": False}
ATTENTION_DEFAULTS: dict[str, Any] = {"alibi": False}
# The path of the config in a Composer checkpoint.
CONFIG_KEYS = ("state", "integrations", "huggingface", "model", "config", "content")
PREFIX = "model."  # Composer's wrapper around the model


def config_of(content: Mapping[str, Any]) -> MptConfig:
    """The config from an llm-foundry config.json; omitted fields have llm-foundry's defaults."""
    fields: dict[str, Any] = {**DEFAULTS, **content}
    for name in ("auto_map", "name", "loss_fn"):
        fields.pop(name, None)
    attention: dict[str, Any] = fields.get("attn_config") or {}
    fields["attn_config"] = {**ATTENTION_DEFAULTS, **attention}
    return MptConfig.from_dict(fields)


def recognise(path: Path) -> bool:
    """Whether a path is a folder whose config.json names llm-foundry's class, or a Composer checkpoint."""
    if path.is_dir() and (path / "config.json").is_file():
        return recognised(read_json(path / "config.json"))
    return (
        path.is_file()
        and path.suffix == ".pt"
        and _at(unpickled(path, stand_ins=True), ("state", "model")) is not None
    )


def recognised(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is llm-foundry's."""
    names = [str(name) for name in content.get("architectures") or ()]
    upstream = any(name.startswith("MPT") for name in names) or "auto_map" in content
    return content.get("model_type") == "mpt" and upstream


def read(path: Path | str, options: HubOptions) -> Checkpoint:
    """Read an exported folder (local or on the hub), or a Composer checkpoint of a whole model."""
    tensors: Tensors
    if isinstance(path, str) or path.is_dir():
        file = find_file(path, "config.json", options)
        assert file is not None
        content: Any = read_json(file)
        tensors, found = open_store(find_weights(path, options), "np"), companions(path, options)
    else:
        whole = unpickled(path, stand_ins=True)
        content, state = _at(whole, CONFIG_KEYS), _at(whole, ("state", "model"))
        if not isinstance(content, Mapping) or state is None:
            raise CheckpointError(
                f"{path} is no Composer checkpoint of a whole model: expected its weights under state.model and its "
                f"config under {'.'.join(CONFIG_KEYS)}"
            )
        tensors, found = PickledTensors(flat_tensors(state, path), path), dict[str, Path]()
    if cast("dict[str, Any]", content).get("model_type", "mpt") != "mpt":
        raise CheckpointError(
            f"{path} is of type {content['model_type']!r}: of llm-foundry's models, only MPT is supported"
        )
    config = config_of(cast("dict[str, Any]", content))
    names = list(tensors)
    if all(name.startswith(PREFIX) for name in names):
        tensors = RenamedTensors(tensors, {name.removeprefix(PREFIX): name for name in names})
    row = causal_class(config)
    return assembled(config, row, tensors, mpt_keymap(config, row.head), found)


def _at(content: object, keys: tuple[str, ...]) -> object:
    for key in keys:
        content = cast("dict[str, object]", content).get(key) if isinstance(content, Mapping) else None
    return content


FORMAT = Format(name="llm-foundry", title="llm-foundry's MPT", recognise=recognise, read=read)
