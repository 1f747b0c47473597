"""Checkpoint formats: the `Checkpoint` that readers return and writers take, and the reader of transformers' format."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monoblock import families, tree
from monoblock.auto import AutoConfig
from monoblock.checkpoint import quantized
from monoblock.checkpoint.dequantized import DequantizedTensors
from monoblock.checkpoint.foreign import opened
from monoblock.checkpoint.hub import HubOptions, WeightFiles, find_file, find_weights, kind_of
from monoblock.checkpoint.keymap import KeyMap, KeyMatch
from monoblock.checkpoint.store import Store, open_store
from monoblock.checkpoint.weights import CanonicalWeights, Shape, Tensors, open_weights
from monoblock.config import PretrainedConfig
from monoblock.families import Family, ModelClass

# Files that are copied along with the weights.
COMPANIONS = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE"),
)
# Patterns of further such files, which are searched in local folders only.
PATTERNS = ("tokenizer.model.*", "additional_chat_templates/*.jinja")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: config, model class, and weights by canonical name.

    `companions`: its other files, file name -> path. `texts`: files that the source lacks and its format implies, file
    name -> content. `left_out`: tensors that the class does not use. `dequantized`: whether the files hold quantised
    matrices, which are read in float32 or, where their own reader does so, in bfloat16. `hub`: the `from_pretrained`
    arguments that load it, for a checkpoint in transformers' format that is not quantised."""

    config: PretrainedConfig
    row: ModelClass
    weights: CanonicalWeights
    companions: Mapping[str, Path] = field(default_factory=dict[str, Path])
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: tuple[str, ...] = ()
    dequantized: bool = False
    hub: Mapping[str, Any] | None = None

    @property
    def family(self) -> Family:
        """The family of the model."""
        return families.family(self.config.model_type)

    def keymap(self) -> KeyMap:
        """The key map of transformers' format."""
        return self.family.keymap(self.config, self.row.head)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a conversion.

    `source_format`, `target_format`: names in `FORMATS`; the source may be "auto". `dtype`: "float32", "float16" or
    "bfloat16" (None: as stored). `max_shard_size`: in bytes, or a string such as "5GB" (None: 50 GB in transformers'
    format, else one file). `kv_heads`: mean-pool the key and value heads to this number. `check`: read the result back
    and compare. `force`: replace an existing target folder. `hub`: download options of the source.
    """

    source_format: str = "auto"
    target_format: str = "hub"
    dtype: str | None = None
    max_shard_size: int | str | None = None
    kv_heads: int | None = None
    check: bool = False
    force: bool = False
    hub: HubOptions = field(default_factory=HubOptions)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A checkpoint format.

    `recognise` tells whether a local file or folder has this format; `read` opens one; `write` writes one into an empty
    folder and reads each weight once (None: the format is read-only). `model_type`: the only family whose causal model
    it can hold (None: any family).
    """

    name: str
    title: str
    recognise: Callable[[Path], bool]
    read: Callable[[Path | str, HubOptions], Checkpoint]
    write: Callable[[Path, Checkpoint, Options], None] | None = None
    model_type: str | None = None


def assembled(
    config: PretrainedConfig,
    row: ModelClass,
    tensors: Tensors,
    keymap: KeyMap,
    companions: Mapping[str, Path],
    *,
    texts: Mapping[str, str] | None = None,
    hub: Mapping[str, Any] | None = None,
    dequantized: bool = False,
) -> Checkpoint:
    """A checkpoint from tensors and their key map; CheckpointError names a tensor that does not fit."""
    spec, head = config.to_spec(), config.to_head(row.head) if row.head else None
    weights, match = open_weights(tensors, keymap, tree.parameters(spec, head), tree.tied(spec, head))
    return Checkpoint(
        config=config,
        row=row,
        weights=weights,
        companions=companions,
        texts=texts or {},
        left_out=tuple(match.unread),
        hub=hub,
        dequantized=dequantized,
    )


def causal_class(config: PretrainedConfig) -> ModelClass:
    """The causal language model of the family: the class that original releases hold."""
    return next(c for c in families.family(config.model_type).classes if c.head == "causal")


def read_hub(name: Path | str, options: HubOptions) -> Checkpoint:
    """A folder or hub repository in transformers' format; any spelling in the family's key map is read."""
    kwargs: dict[str, Any] = {
        "revision": options.revision,
        "token": options.token,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only,
        "subfolder": options.subfolder,
        "gguf_file": options.gguf_file,
    }
    config: Any = AutoConfig.from_pretrained(str(name), **kwargs)
    kwargs["pretrained_model_name_or_path"] = str(name)
    store = open_store(find_weights(name, options), "np")
    tensors = opened(store, config, name, options, "np")
    dequantized = tensors is not store or quantized.is_quantized(tensors)
    if dequantized:
        config.__dict__.pop("quantization_config", None)
        kwargs = {}  # `from_pretrained` would read the quantised weights
    if quantized.is_quantized(tensors):
        tensors = DequantizedTensors(tensors)
    row = class_of(config, tensors)
    keymap = families.family(config.model_type).keymap(config, row.head)
    if isinstance(tensors, DequantizedTensors):
        spec, head = config.to_spec(), config.to_head(row.head) if row.head else None
        tensors.fit(keymap, tree.parameters(spec, head), tree.tied(spec, head))
    found = companions(name, options)
    return assembled(config, row, tensors, keymap, found, hub=kwargs or None, dequantized=dequantized)


def class_of(config: PretrainedConfig, keys: Iterable[str]) -> ModelClass:
    """The class named by the config's `architectures`; else, of the classes that need exactly these tensors, the one
    whose written names match most of `keys`."""
    family = families.family(config.model_type)
    if named := families.named_classes(config):
        return named[0]
    keys = frozenset(keys)
    # In a tie, or if no class fits, prefer classes that give the most informative errors.
    rows = sorted(family.classes, key=lambda row: row.head not in ("causal", "masked"))
    return max(rows, key=lambda row: _fit(family, config, row, keys))


def _fit(family: Family, config: PretrainedConfig, row: ModelClass, keys: frozenset[str]) -> int:
    """How many of `keys` the class would write itself; -1 if it needs other tensors."""
    match, keymap, parameters = _match(family, config, row, keys)
    if match.missing or match.unread or match.unknown:
        return -1
    return sum(name in keys for canonical in parameters for name in keymap.source(canonical).names)


def lacks(config: PretrainedConfig, row: ModelClass, keys: Iterable[str]) -> bool:
    """Whether a class needs tensors that are not among `keys`."""
    match, *_ = _match(families.family(config.model_type), config, row, frozenset(keys))
    return bool(match.missing)


def _match(
    family: Family, config: PretrainedConfig, row: ModelClass, keys: frozenset[str]
) -> tuple[KeyMatch, KeyMap, Mapping[str, Shape]]:
    spec, head = config.to_spec(), config.to_head(row.head) if row.head else None
    keymap, parameters = family.keymap(config, row.head), tree.parameters(spec, head)
    return keymap.match(parameters, keys, tree.tied(spec, head)), keymap, parameters


def companions(name: Path | str, options: HubOptions | None = None) -> dict[str, Path]:
    """The files that accompany the weights in a folder or hub repository: name -> local path."""
    options = options or HubOptions()
    found = {file: find_file(name, file, options, required=False) for file in COMPANIONS}
    folder = Path(name) / options.subfolder
    if folder.is_dir():
        for pattern in PATTERNS:
            found |= {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))}
    return {file: path for file, path in found.items() if path is not None}


def local_store(paths: Iterable[Path]) -> Store:
    """The tensors of local files, all of the first file's kind (`kind_of`)."""
    paths = tuple(paths)
    return open_store(WeightFiles(kind=kind_of(paths[0]), paths=paths), "np")


def config_to_write(config: PretrainedConfig, row: ModelClass, dtype: str | None) -> PretrainedConfig:
    """The config to write to config.json, with that class and dtype, and without `auto_map` (remote code is not
    copied)."""
    new = copy.deepcopy(config)
    vars(new).pop("auto_map", None)
    new.architectures = [config.stored_class(row.name)]
    new.dtype = dtype
    return new


def local(read: Callable[[Path], Checkpoint]) -> Callable[[Path | str, HubOptions], Checkpoint]:
    """Adapts a reader of local files to `Format.read`, whose download options it ignores."""
    return lambda path, _: read(Path(path))
