"""A checkpoint of any format, opened: its config, its class, its weights by canonical name, its other files."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monoblock import families, tree
from monoblock.auto import AutoConfig
from monoblock.checkpoint import quantized
from monoblock.checkpoint.hub import HubOptions, WeightFiles, find_file, find_weights, kind_of
from monoblock.checkpoint.keymap import KeyMap, KeyMatch
from monoblock.checkpoint.store import Store, open_store
from monoblock.checkpoint.weights import CanonicalWeights, Shape, Tensors, open_weights
from monoblock.config import PretrainedConfig
from monoblock.families import Family, ModelClass

# Files that go with the weights as they are, by the hub's names.
COMPANIONS = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE"),
)
# More of them, which can only be looked for in a local folder.
PATTERNS = ("tokenizer.model.*", "additional_chat_templates/*.jinja")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint. `companions`: where its other files are, by their names on the hub; `texts`: such files as the
    source lacks and its format implies, with their content. `left_out`: names of tensors
    that its class has no place for. `hub`: the arguments of `from_pretrained` that load it, where it is the hub's."""

    config: PretrainedConfig
    row: ModelClass
    weights: CanonicalWeights
    companions: Mapping[str, Path] = field(default_factory=dict[str, Path])
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: tuple[str, ...] = ()
    hub: Mapping[str, Any] | None = None

    @property
    def family(self) -> Family:
        """The family of the model."""
        return families.family(self.config.model_type)

    def keymap(self) -> KeyMap:
        """The hub's names of the model's parameters."""
        return self.family.keymap(self.config, self.row.head)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may say about a conversion.

    `source_format` and `target_format` are names of `FORMATS`, the first one "auto" too. `dtype`: "float32",
    "float16" or "bfloat16" (None: as stored). `max_shard_size`: bytes, or "5GB" (None: one file up to 50 GB on the
    hub's side). `kv_heads`: pool the key and value heads to so many. `check`: read the result back and compare.
    `force`: replace an existing target folder. `hub`: where a model on the hub comes from.
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
    """A way in which checkpoints are published.

    `recognise` says whether a local file or folder is of that format; `read` opens one; `write` writes one into an
    empty folder (None: this format is only read), each weight once. `model_type`: the family whose causal model
    it can hold (None: any).
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
) -> Checkpoint:
    """A checkpoint of tensors that a key map names; CheckpointError says what does not fit."""
    spec, head = config.to_spec(), config.to_head(row.head) if row.head else None
    weights, plan = open_weights(tensors, keymap, tree.parameters(spec, head), tree.tied(spec, head))
    return Checkpoint(
        config=config,
        row=row,
        weights=weights,
        companions=companions,
        texts=texts or {},
        left_out=tuple(plan.unread),
        hub=hub,
    )


def causal_class(config: PretrainedConfig) -> ModelClass:
    """The class of a family that predicts the next token: what makers publish."""
    return next(c for c in families.family(config.model_type).classes if c.head == "causal")


def read_hub(name: Path | str, options: HubOptions) -> Checkpoint:
    """A folder or a model on the hub, in the hub's format, with any spelling of names that its family knows."""
    kwargs: dict[str, Any] = {
        "revision": options.revision,
        "token": options.token,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only,
        "subfolder": options.subfolder,
    }
    config = AutoConfig.from_pretrained(str(name), **kwargs)
    store = open_store(find_weights(name, options), "np")
    quantized.refuse(store)
    row = class_of(config, store)
    keymap = families.family(config.model_type).keymap(config, row.head)
    kwargs["pretrained_model_name_or_path"] = str(name)
    return assembled(config, row, store, keymap, companions(name, options), hub=kwargs)


def class_of(config: PretrainedConfig, keys: Iterable[str]) -> ModelClass:
    """The class that a config's `architectures` name; without one, of those that need just these tensors the one that
    would write most of these names."""
    family = families.family(config.model_type)
    if named := families.named_classes(config):
        return named[0]
    keys = frozenset(keys)
    # Where several are as good, or none fits, the one whose errors say most.
    rows = sorted(family.classes, key=lambda row: row.head not in ("causal", "masked"))
    return max(rows, key=lambda row: _fit(family, config, row, keys))


def _fit(family: Family, config: PretrainedConfig, row: ModelClass, keys: frozenset[str]) -> int:
    """How many of the names a class would write itself; -1 if it needs other tensors."""
    plan, keymap, parameters = _planned(family, config, row, keys)
    if plan.missing or plan.unread or plan.unknown:
        return -1
    return sum(name in keys for canonical in parameters for name in keymap.source(canonical).names)


def lacks(config: PretrainedConfig, row: ModelClass, keys: Iterable[str]) -> bool:
    """Whether tensors of these names are not all that a class needs."""
    plan, *_ = _planned(families.family(config.model_type), config, row, frozenset(keys))
    return bool(plan.missing)


def _planned(
    family: Family, config: PretrainedConfig, row: ModelClass, keys: frozenset[str]
) -> tuple[KeyMatch, KeyMap, Mapping[str, Shape]]:
    spec, head = config.to_spec(), config.to_head(row.head) if row.head else None
    keymap, parameters = family.keymap(config, row.head), tree.parameters(spec, head)
    return keymap.match(parameters, keys, tree.tied(spec, head)), keymap, parameters


def companions(name: Path | str, options: HubOptions | None = None) -> dict[str, Path]:
    """The files of a folder or a model on the hub that go with its weights: name -> local path."""
    options = options or HubOptions()
    found = {file: find_file(name, file, options, required=False) for file in COMPANIONS}
    folder = Path(name) / options.subfolder
    if folder.is_dir():
        for pattern in PATTERNS:
            found |= {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))}
    return {file: path for file, path in found.items() if path is not None}


def local_store(paths: Iterable[Path]) -> Store:
    """The tensors of local files, all of one kind; what has no ending of another kind is a pickle."""
    paths = tuple(paths)
    return open_store(WeightFiles(kind=kind_of(paths[0]), paths=paths), "np")


def hub_config(config: PretrainedConfig, row: ModelClass, dtype: str | None) -> PretrainedConfig:
    """The config as config.json is to have it: of that class and dtype, and without references to code that is
    not copied."""
    new = copy.deepcopy(config)
    vars(new).pop("auto_map", None)
    new.architectures = [config.stored_class(row.name)]
    new.dtype = dtype
    return new


def local(read: Callable[[Path], Checkpoint]) -> Callable[[Path | str, HubOptions], Checkpoint]:
    """A reader of local files as a format's `read`; the hub's options say nothing about those."""
    return lambda path, _: read(Path(path))
