"""Records of datasets: of the hub, of a repository folder, or saved by the package `datasets`, which is imported at the
first use. No code of a dataset is run."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from monoblock.checkpoint.remote_errors import status_of
from monoblock.installed import installed

log = logging.getLogger("monoblock")

_FORM = re.compile(
    r"(?P<name>[^:@\s]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<config>[\w.-]+)(?=:))?"
    r"(?::(?P<split>[a-zA-Z][\w.]*(?:\[[^\]\s]*\])?(?:\+[a-zA-Z][\w.]*(?:\[[^\]\s]*\])?)*))?"
)
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_FIRST = re.compile(r"(\w+)\[:(\d+)\]")  # the slice that streaming takes
# Files of `save_to_disk`, of one split and of several.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")
_README = "README.md"
_ROWS = 1000  # that are converted at a time
_TIMEOUT = 10  # seconds for the first answer of the hub
_EVALUATION = ("validation", "test")  # the splits of evaluation data, by preference


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A dataset as it is named: NAME[@REVISION][:CONFIG][:SPLIT]. `name`: a folder, or OWNER/NAME on the hub."""

    given: str
    name: str
    revision: str | None
    config: str | None
    split: str | None

    @property
    def local(self) -> bool:
        """Whether the name is that of a folder."""
        return Path(self.name).is_dir()

    @property
    def saved(self) -> bool:
        """Whether `save_to_disk` wrote the folder."""
        return any((Path(self.name) / name).is_file() for name in (_SAVED, _SAVED_SPLITS))


@dataclass(frozen=True, kw_only=True)
class DatasetRows:
    """Rows as dicts, and the names of the classes of each column that has them; of these the rows have names too."""

    rows: list[dict[str, Any]]
    classes: dict[str, list[str]]


def dataset_source(data: str, *, documents: bool = False) -> DatasetSource | None:
    """The dataset that `data` names; None: it is a file, or a folder of texts (`documents`), or there is no such path.
    ValueError: a split of a file."""
    path = Path(data)
    if path.is_file():
        return None
    if path.is_dir():
        found = DatasetSource(given=data, name=data, revision=None, config=None, split=None)
        return found if found.saved or _is_repository(path, documents) else None
    match = _FORM.fullmatch(data)
    if match is None:
        return None
    found = DatasetSource(given=data, **match.groupdict())
    if Path(found.name).is_file():
        raise ValueError(f"{data}: a split is for datasets, but {found.name} is a file: leave it out")
    if found.local:
        return found
    named = "/" in found.name or found.split is not None
    if (
        not named
        or not _HUB_NAME.fullmatch(found.name)
        or Path(found.name).suffix.lower() in (*_FILES, ".txt")
    ):
        return None
    return found


def _is_repository(folder: Path, documents: bool) -> bool:
    """Whether a folder has files of records. A folder for documents must also have a README.md with metadata, since its
    text files may be meant."""
    if not any(p.is_file() and p.suffix.lower() in _FILES for p in folder.rglob("*")):
        return False
    if not documents:
        return True
    readme = folder / _README
    if not readme.is_file():
        return False
    with readme.open("rb") as file:
        return file.readline(16).strip() == b"---"


def read_dataset(source: DatasetSource, *, train: bool, streaming: bool, offline: bool) -> DatasetRows:
    """The rows of a split: as named, else `train`, for evaluation (not `train`) `validation` or `test`. ValueError: the
    dataset or the split cannot be read. ImportError: the package is not installed."""
    where = source.given
    if not installed("datasets"):
        what = "" if source.local else "there is no such file or folder; "
        raise ImportError(
            f'{where}: {what}datasets are read by the package datasets: pip install "monoblock[datasets]"'
        )
    if source.local and (Path(source.name) / f"{Path(source.name).resolve().name}.py").is_file():
        raise ValueError(
            f"{where}: the dataset is a loading script, whose code is not run: convert it to Parquet or JSONL files"
        )
    package: Any = importlib.import_module("datasets")
    with _reported(source, offline):
        offline = offline or not (source.local or _reachable(source))
    with _offline(package, offline), _reported(source, offline):
        if source.saved:
            return _converted(_saved(package, source, train, streaming))
        builder = package.load_dataset_builder(source.name, source.config, revision=source.revision)
        names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
        split = _split(source, names, train)
        if not streaming:
            builder.download_and_prepare()
            return _converted(builder.as_dataset(split=split))
        first = _FIRST.fullmatch(split)
        if first is None and not split.isidentifier():
            raise ValueError(
                f"{where}: streaming takes a whole split or its first rows, such as train[:1000]"
            )
        name, count = (split, None) if first is None else (first[1], int(first[2]))
        return _converted(builder.as_streaming_dataset(split=name), count)


def _reachable(source: DatasetSource) -> bool:
    """Whether the hub answers; the package would try again for half a minute. The hub's errors are raised."""
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        hub.HfApi().dataset_info(source.name, revision=source.revision, timeout=_TIMEOUT)
    except Exception as error:
        if status_of(error) is not None:
            raise
        log.warning("%s: the hub cannot be reached; datasets in the cache are used", source.given)
        return False
    return True


def _saved(package: Any, source: DatasetSource, train: bool, streaming: bool) -> Any:
    """The split of a folder of `save_to_disk`."""
    for name, given in (
        ("streaming", streaming),
        ("a config", source.config),
        ("a revision", source.revision),
    ):
        if given:
            raise ValueError(
                f"{source.given}: {name} has no effect on a dataset that save_to_disk wrote: drop it"
            )
    found = package.load_from_disk(source.name)
    if not isinstance(found, Mapping):
        if source.split is not None:
            raise ValueError(
                f"{source.given}: the folder holds one dataset without splits: drop {source.split!r}"
            )
        return found
    split = _split(source, list(found), train)
    if split not in found:
        raise ValueError(f"{source.given}: of a dataset that save_to_disk wrote only whole splits are read")
    return found[split]


def _split(source: DatasetSource, names: list[str], train: bool) -> str:
    """The split that is read."""
    wanted = ("train",) if train else _EVALUATION
    split = source.split or next((name for name in wanted if name in names), None)
    known = ", ".join(names)
    if split is None:
        raise ValueError(
            f"{source.given}: the dataset has no split {' or '.join(wanted)}; name one of {known}, such as "
            f"{source.name}:{names[0] if names else 'train'}"
        )
    for part in split.split("+"):
        if names and (name := part.partition("[")[0]) not in names:
            raise ValueError(f"{source.given}: the dataset has no split {name!r}; it has {known}")
    return split


def _converted(dataset: Any, count: int | None = None) -> DatasetRows:
    """The rows without decoding (images stay bytes), at most `count`."""
    features: Mapping[str, Any] = dataset.features or {}
    classes = {name: found for name, feature in features.items() if (found := _names(feature)) is not None}

    def named(names: list[str], value: Any) -> Any:
        if isinstance(value, list):
            return [named(names, one) for one in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    def rows() -> Iterator[dict[str, Any]]:
        for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
            for row in table.to_pylist():
                yield row | {name: named(names, row[name]) for name, names in classes.items()}

    return DatasetRows(rows=list(islice(rows(), count)), classes=classes)


def _names(feature: Any) -> list[str] | None:
    """The names of the classes of a feature, or of a list of them."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return [str(name) for name in names] if isinstance(names, list) and hasattr(inner, "int2str") else None


@contextmanager
def _offline(package: Any, offline: bool) -> Iterator[None]:
    """Without requests in the block; the packages read their environment variable only when they are imported."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    before = package.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if offline:
        package.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        package.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


@contextmanager
def _reported(source: DatasetSource, offline: bool) -> Iterator[None]:
    """Errors of the package as one sentence."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(source.given):
            raise
        raise ValueError(f"{source.given}: the dataset cannot be read: {_line(error)}") from error
    except (FileNotFoundError, ConnectionError) as error:
        if source.local:
            raise ValueError(f"{source.given}: the dataset cannot be read: {_line(error)}") from error
        which = "in the cache (offline)" if offline else "on the hub"
        raise FileNotFoundError(
            f"{source.given}: there is no such file or folder, and no dataset {source.name!r} {which}: {_line(error)}"
        ) from error
    except Exception as error:  # of many kinds: pyarrow, the hub, damaged files, loading scripts
        if status_of(error) == 404:
            raise FileNotFoundError(
                f"{source.given}: there is no such file or folder, and no dataset {source.name!r} on the hub"
            ) from error
        raise ValueError(f"{source.given}: the dataset cannot be read: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def digest_of_rows(rows: Iterator[Mapping[str, Any]]) -> Iterator[bytes]:
    """The bytes that identify rows."""
    for row in rows:
        yield json.dumps(row, sort_keys=True, default=str).encode() + b"\n"
