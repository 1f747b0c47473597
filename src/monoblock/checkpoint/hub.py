"""Find a model's files in a local folder or on the hub.

Downloads go through huggingface_hub and respect its environment variables (HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN,
HF_HOME, ...). For local folders, huggingface_hub is not imported.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeVar, cast

from monoblock.checkpoint.contents import explained
from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.fingerprint import FINGERPRINTS
from monoblock.checkpoint.gguf.header import is_gguf
from monoblock.checkpoint.gguf.parts import part_names
from monoblock.checkpoint.journal import hidden, located, version
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.remote import Remote
from monoblock.checkpoint.transaction import SAVE_ID
from monoblock.errors import CheckpointError, HubError
from monoblock.field_types import brief

__all__ = ["HubOptions", "WeightFiles", "find_file", "find_weights", "kind_of", "read_json"]

Read = TypeVar("Read")
Kind = Literal["safetensors", "bin", "msgpack", "h5", "gguf"]

# In order of preference; a single file is preferred to an index of the same kind. The last two are the files of
# transformers 4's Flax and TensorFlow classes.
_FORMATS: dict[Kind, str] = {
    "safetensors": "model.safetensors",
    "bin": "pytorch_model.bin",
    "msgpack": "flax_model.msgpack",
    "h5": "tf_model.h5",
}

# Names of weight files and of their indexes.
WEIGHT_NAMES = tuple(name + end for name in _FORMATS.values() for end in ("", ".index.json"))

_READ = 20  # attempts to read files that a concurrent save replaces
_LISTED = 12  # file names shown in an error


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The local files that hold a model's weights.

    `weight_map`: tensor name -> the one of `paths` that holds it, from the index; None for a single file. `save_id`:
    the save that wrote the index, if recorded. `fingerprints`: of the files, if the index has them.
    """

    kind: Kind
    paths: tuple[Path, ...]
    weight_map: Mapping[str, Path] | None = None
    save_id: str | None = None
    fingerprints: Mapping[Path, str] = field(default_factory=dict[Path, str])


class _Location(Protocol):
    """A folder or hub repository; `str()` names it in error messages."""

    def get(self, filename: str) -> Path | None: ...
    def get_all(self, filenames: Sequence[str]) -> list[Path | None]: ...
    def names(self) -> list[str]: ...


class _Folder:
    """A local folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __str__(self) -> str:
        return f"the folder {self._folder}"

    def get(self, filename: str) -> Path | None:
        return located(self._folder, filename)

    def get_all(self, filenames: Sequence[str]) -> list[Path | None]:
        return [self.get(filename) for filename in filenames]

    def names(self) -> list[str]:
        return sorted(
            path.name + "/" * path.is_dir() for path in self._folder.iterdir() if not hidden(path.name)
        )


def kind_of(path: Path) -> Kind:
    """The kind of a weight file by its suffix; any other suffix means a pickle."""
    kinds: dict[str, Kind] = {".safetensors": "safetensors", ".msgpack": "msgpack", ".h5": "h5"}
    return kinds.get(path.suffix, "bin")


def find_file(
    name_or_path: str | os.PathLike[str],
    filename: str,
    options: HubOptions | None = None,
    *,
    required: bool = True,
) -> Path | None:
    """The local path of one file of a model, downloaded from the hub if necessary.

    `name_or_path` is a folder, or a hub repository such as "mosaicml/mpt-7b". If there is no such file: None, or
    `HubError` if it is `required`. `HubError` also if the model, the revision or the network is unavailable.
    """
    options = options or HubOptions()
    if in_gguf(name_or_path, options):
        if required:
            raise HubError(f"{options.gguf_file or name_or_path} is a GGUF file, which has no {filename}")
        return None
    location = _location(name_or_path, options)
    path = location.get(filename)
    if path is None and required:
        raise HubError(f"{location} has no {filename}; {_content(location, filename == 'config.json')}")
    return path


def find_weights(
    name_or_path: str | os.PathLike[str],
    options: HubOptions | None = None,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    prefer: Kind | Sequence[Kind] = (),
) -> WeightFiles:
    """The files with a model's weights; files on the hub are downloaded in parallel, with progress bars.

    Takes the first that exists of model.safetensors, pytorch_model.bin, flax_model.msgpack and tf_model.h5, each before
    its index. `prefer`: kinds to try first, in order: "msgpack", or ("safetensors", "h5"). `variant="fp16"` looks for
    model.fp16.safetensors and so on. `use_safetensors`: True for safetensors only, False for other kinds only.
    `HubError` if there are no weights, or they cannot be downloaded; `CheckpointError` if an index is invalid or lists
    a missing file. A GGUF file is taken if it is named, by its path or by `gguf_file`.
    """
    options = options or HubOptions()
    if in_gguf(name_or_path, options):
        if variant is not None:
            raise ValueError(f"variant={variant!r} is for folders: a GGUF file is named by gguf_file")
        return WeightFiles(kind="gguf", paths=find_gguf(name_or_path, options))
    location = _location(name_or_path, options)
    for kind in _order(prefer, use_safetensors):
        filename = _FORMATS[kind]
        path = location.get(_with_variant(filename, variant))
        if path is not None:
            return WeightFiles(kind=kind, paths=(path,))
        index = location.get(_with_variant(f"{filename}.index.json", variant))
        if index is not None:
            return _sharded(location, kind, index)
    raise _no_weights(location, variant, use_safetensors)


def in_gguf(name_or_path: str | os.PathLike[str], options: HubOptions) -> bool:
    """Whether a model is given as a GGUF file: by `gguf_file`, or by the path of one."""
    if options.gguf_file is not None:
        return True
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    return path.is_file() and (path.suffix == ".gguf" or is_gguf(path))


def find_gguf(name_or_path: str | os.PathLike[str], options: HubOptions) -> tuple[Path, ...]:
    """The local paths of a model's GGUF file and, if it is the first of several parts, of the others.

    `HubError`: a file is missing, or cannot be downloaded. `CheckpointError`: the file is a part, but not the first.
    """
    if options.gguf_file is None:
        path = Path(os.fspath(name_or_path)).expanduser()
        location, first = _Folder(path.parent), path.name
    else:
        if Path(os.fspath(name_or_path)).expanduser().is_file():
            raise ValueError(
                f"gguf_file={options.gguf_file!r} is for folders and models on the hub, but {name_or_path} is a file"
            )
        location, first = _location(name_or_path, options), options.gguf_file
    names = part_names(first) or [first]
    paths = location.get_all(names)
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise HubError(f"{location} has no {name}; {_content(location, False)}")
    return tuple(path for path in paths if path is not None)


def consistent_read(
    name_or_path: str | os.PathLike[str], options: HubOptions, read: Callable[[], Read]
) -> Read:
    """The result of `read()`, called again if a concurrent save replaced files of a local folder meanwhile;
    CheckpointError after 20 attempts."""
    folder = Path(name_or_path).expanduser() / options.subfolder
    if not folder.is_dir():
        return read()
    for _ in range(_READ):
        before = version(folder)
        try:
            found = read()
        except (OSError, CheckpointError):
            if version(folder) == before:
                raise
            continue
        if version(folder) == before:
            return found
    raise CheckpointError(
        f"the folder {folder} was changed by other saves during each of {_READ} attempts to read it: load it later"
    )


def _order(prefer: Kind | Sequence[Kind], use_safetensors: bool | None) -> list[Kind]:
    """The kinds to look for, in order."""
    first: tuple[Kind, ...] = (prefer,) if isinstance(prefer, str) else tuple(prefer)
    if unknown := set(first) - set(_FORMATS):
        raise ValueError(f"prefer={prefer!r}: expected kinds among {', '.join(_FORMATS)}, got {unknown}")
    kinds = dict.fromkeys((*first, *_FORMATS))
    return [kind for kind in kinds if use_safetensors in (None, kind == "safetensors")]


def _location(name_or_path: str | os.PathLike[str], options: HubOptions) -> _Location:
    name = os.fspath(name_or_path)
    if not name:
        raise HubError(
            "the model's name is empty: give a folder or a name on the hub, such as 'mosaicml/mpt-7b'"
        )
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise HubError(f"{name} is a file: give its folder, which holds config.json, or a GGUF file")
        if not isinstance(name_or_path, str) or _looks_local(name):
            raise HubError(f"there is no folder {name}: check the path (the current folder is {Path.cwd()})")
        return Remote(name, options)
    if options.revision not in (None, "main"):
        raise HubError(
            f"revision={options.revision!r} is for models on the hub, but {name} is a local folder: "
            "leave it out"
        )
    if not (folder / options.subfolder).is_dir():
        raise HubError(f"the folder {name} has no subfolder '{options.subfolder}'")
    return _Folder(folder / options.subfolder)


def _looks_local(name: str) -> bool:
    """Whether a name can only be a path: names on the hub have at most one slash and start with a letter or digit."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or Path(name).is_absolute()


def _with_variant(filename: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`; in an index, the variant precedes `.json`."""
    if variant is None:
        return filename
    stem, suffix = filename.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}"


def _sharded(location: _Location, kind: Kind, index: Path) -> WeightFiles:
    listed, save_id, prints = _read_index(index)
    names = sorted(set(listed.values()))
    paths: dict[str, Path] = {}
    for name, path in zip(names, location.get_all(names), strict=True):
        if path is None:
            raise CheckpointError(
                f"{location} has no {name}, which {index.name} lists: fetch the model again"
            )
        paths[name] = path
    weight_map = {tensor: paths[name] for tensor, name in listed.items()}
    return WeightFiles(
        kind=kind,
        paths=tuple(paths.values()),
        weight_map=weight_map,
        save_id=save_id,
        fingerprints={path: prints[name] for name, path in paths.items() if name in prints},
    )


def _read_index(index: Path) -> tuple[dict[str, str], str | None, dict[str, str]]:
    """Tensor name -> file name, the id of the save, and file name -> fingerprint, as far as the index has them. File
    names are validated: an untrusted index must not name a file outside its folder."""
    content = read_json(index)
    listed, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{index} is no index of weights: it lacks a weight_map of tensor names to file names"
        )
    for tensor, name in cast(dict[str, Any], listed).items():
        if not isinstance(name, str) or not _is_inside(name):
            raise CheckpointError(
                f"{index} is refused: it maps {brief(tensor)} to {brief(name)}, which is no file of its folder"
            )
    notes = cast(dict[str, Any], metadata) if isinstance(metadata, dict) else {}
    save_id, found = notes.get(SAVE_ID), notes.get(FINGERPRINTS)
    prints = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    return (
        cast(dict[str, str], listed),
        save_id if isinstance(save_id, str) else None,
        {name: value for name, value in prints.items() if isinstance(value, str)},
    )


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name)
    return (
        bool(parts.name)
        and not parts.is_absolute()
        and ".." not in parts.parts
        and not set(name) & set("\\:\0")
        and all(len(part.encode()) < 256 for part in parts.parts)  # the limit of file systems
        and len(parts.parts) < 16
    )


def _no_weights(location: _Location, variant: str | None, use_safetensors: bool | None) -> HubError:
    wanted = [_with_variant(_FORMATS[kind], variant) for kind in _order((), use_safetensors)]
    return HubError(
        f"{location} has no weights: expected {' or '.join(wanted)} (or its index); {_content(location, True)}"
    )


def _content(location: _Location, model: bool) -> str:
    """What the location holds instead, for an error; `model`: whether a model was expected there."""
    names = location.names()
    if not names:
        return "no other files are known"
    if model and not set(names) & set(WEIGHT_NAMES) and (what := explained(names)) is not None:
        return what
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"it holds {', '.join(names[:_LISTED])}{more}"
