"""Saves into folders with an existing model, and readers of the result, for tests of transactions. NumPy only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import kill_points
import numpy as np

from monoblock.checkpoint import journal
from monoblock.checkpoint.folder import new_folder
from monoblock.checkpoint.header import read_header
from monoblock.checkpoint.hub import HubOptions, consistent_read, find_file, find_weights
from monoblock.checkpoint.msgpack_save import save_msgpack
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.checkpoint.transaction import staged

NAMES = ("a.weight", "b.weight", "c.weight")
SIZE = 300  # elements of a tensor
BYTES = 4 * SIZE
# Files of a user or a trainer in a model's folder.
OTHERS = {"README.md": "mine", "tokenizer.json": "{}", "optimizer.pt": "state"}
HIDDEN = ".monoblock"


def tensors(tag: int) -> dict[str, np.ndarray]:
    return {name: np.full(SIZE, tag, np.float32) for name in NAMES}


def config(tag: int) -> str:
    return json.dumps({"model_type": "mpt", "tag": tag})


def save(folder: Path, tag: int, *, per_shard: int = 3) -> None:
    """Saves a model whose elements all equal `tag`, with `per_shard` tensors in a file."""
    extra_files = {"config.json": config(tag), "generation_config.json": json.dumps({"tag": tag})}
    save_tensors(
        folder, tensors(tag), framework="np", max_shard_size=per_shard * BYTES, extra_files=extra_files
    )


def save_again(folder: Path, tag: int) -> None:
    """Saves a model whose config does not depend on the tag."""
    save_tensors(folder, tensors(tag), framework="np", extra_files={"config.json": "{}"})


def save_flax(folder: Path, tag: int, *, per_shard: int = 3) -> None:
    """Like `save`, as flax_model.msgpack."""
    extra_files = {"config.json": config(tag)}
    save_msgpack(folder, tensors(tag), max_shard_size=per_shard * BYTES, extra_files=extra_files)


def replace(folder: Path, tag: int) -> None:
    """Replaces the folder like `convert` and `quantize` with --force."""
    with new_folder(folder, replace=True) as new:
        save(new, tag, per_shard=2)
        (new / "vocab.json").write_text(str(tag))


def save_tokenizer(folder: Path, tag: int) -> None:
    """Saves text files like a tokenizer or a processor, one of them in a subfolder."""
    with staged(folder) as stage:
        for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"):
            stage.write(name, json.dumps({"tag": tag}))


def model_in(folder: Path) -> int | None:
    """The tag of the model that this library loads from a folder, or None. AssertionError if files of two saves mix."""

    def read() -> set[int]:
        path = find_file(folder, "config.json", required=False)
        if path is None:
            return set()
        found = {int(tag) for tag in json.loads(path.read_text()).values() if tag != "mpt"}
        generation = find_file(folder, "generation_config.json", required=False)
        found |= {int(json.loads(generation.read_text())["tag"])} if generation else set()
        store = open_store(find_weights(folder), "np")
        assert len(store) == len(NAMES)
        for name in store:
            found |= {int(number) for number in np.unique(store.tensor(name))}
        return found

    if not folder.is_dir():
        return None
    found = consistent_read(folder, HubOptions(), read)
    assert len(found) < 2, f"mixed: {found}"
    return next(iter(found), None)


def read_without_journal(folder: Path) -> set[Any]:
    """The tags that other programs find, which do not read the journal: config.json, then one file or an index."""
    try:
        found = {tag for tag in json.loads((folder / "config.json").read_text()).values() if tag != "mpt"}
    except OSError:
        return set()  # such a program reports an error
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = dict.fromkeys(NAMES, "model.safetensors")
    else:
        names = json.loads(index.read_text())["weight_map"]
    for name, file in names.items():
        entry = read_header(folder / file).entries[name]
        found |= {*np.frombuffer((folder / file).read_bytes()[entry.begin : entry.end], np.float32).tolist()}
    return {int(tag) for tag in found}


def tokenizer_tags(folder: Path) -> set[int]:
    paths = [find_file(folder, name, required=False) for name in ("tokenizer.json", "tokenizer_config.json")]
    paths.append(find_file(folder, "additional_chat_templates/tools.jinja", required=False))
    return {json.loads(path.read_text())["tag"] for path in paths if path}


def leftovers(folder: Path) -> list[str]:
    """Temporary files of saves in a folder and in its parent."""
    folders = [path for path in (folder, folder.parent) if path.is_dir()]
    return [path.name for parent in folders for path in parent.iterdir() if path.name.startswith(HIDDEN)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A save (`do`) into a folder with an older model (`before`). `by` is the commit method: rename, exchange, journal.

    `others` are further files, which persist if `stays`.
    """

    before: Callable[[Path], object]
    do: Callable[[Path], object]
    by: str
    others: Mapping[str, str] = field(default_factory=lambda: OTHERS)
    stays: bool = True

    def prepare(self, folder: Path) -> Path:
        """Creates the folder as it is before the save."""
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        self.before(folder)
        for name, text in self.others.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return folder

    def killed(self, folder: Path, points: int) -> int:
        """Kills the save at `points` of its operations and checks the folder; returns the number of points."""
        self.prepare(folder)
        count = len(kill_points.operations(lambda: self.do(folder)))
        chosen = kill_points.spread(count, points)
        for at in chosen:
            self.prepare(folder)
            assert kill_points.killed(lambda: self.do(folder), at) == (at < count)
            self.check(folder)
        return len(chosen)

    def check(self, folder: Path) -> None:
        """Invariants after a kill at any point: the old model or the new one, and later saves succeed."""
        new = self.before in (nothing, empty)
        assert read_without_journal(folder) in ({1}, {2}, set() if new or self.by == "journal" else {1})
        with mock.patch.object(journal, "locked", side_effect=PermissionError):  # a read-only folder
            first = model_in(folder)
        found = model_in(folder)
        assert found == first
        assert found in (1, 2, None if new else 1)
        for name, text in self.others.items():
            assert not self.stays or (folder / name).read_text() == text
        assert not (folder / journal.COMMIT).exists()
        save(folder, 3, per_shard=1)
        assert model_in(folder) == 3
        assert not leftovers(folder)


def nothing(folder: Path) -> None:
    del folder


def empty(folder: Path) -> None:
    folder.mkdir()


def _no_others(**fields: Any) -> Case:
    return Case(others={}, **fields)


TRAINER = {**OTHERS, "checkpoint-500/optimizer.pt": "more"}

CASES: dict[str, Case] = {
    "new folder": _no_others(before=nothing, do=lambda f: save(f, 2, per_shard=1), by="rename"),
    "empty folder": _no_others(before=empty, do=lambda f: save(f, 2), by="exchange"),
    "one file": Case(before=lambda f: save_again(f, 1), do=lambda f: save_again(f, 2), by="rename"),
    "same layout": Case(before=lambda f: save(f, 1), do=lambda f: save(f, 2), by="exchange"),
    "to shards": Case(before=lambda f: save(f, 1), do=lambda f: save(f, 2, per_shard=1), by="exchange"),
    "from shards": Case(before=lambda f: save(f, 1, per_shard=1), do=lambda f: save(f, 2), by="exchange"),
    "fewer shards": Case(
        before=lambda f: save(f, 1, per_shard=1), do=lambda f: save(f, 2, per_shard=2), by="exchange"
    ),
    "as many shards": Case(
        before=lambda f: save(f, 1, per_shard=1), do=lambda f: save(f, 2, per_shard=1), by="exchange"
    ),
    "trainer, same layout": Case(
        before=lambda f: save(f, 1), do=lambda f: save(f, 2), by="journal", others=TRAINER
    ),
    "trainer, to shards": Case(
        before=lambda f: save(f, 1), do=lambda f: save(f, 2, per_shard=1), by="journal", others=TRAINER
    ),
    "trainer, from shards": Case(
        before=lambda f: save(f, 1, per_shard=1), do=lambda f: save(f, 2), by="journal", others=TRAINER
    ),
    "trainer, as many shards": Case(
        before=lambda f: save(f, 1, per_shard=2),
        do=lambda f: save(f, 2, per_shard=2),
        by="journal",
        others=TRAINER,
    ),
    "replaced": Case(
        before=lambda f: save(f, 1, per_shard=1), do=lambda f: replace(f, 2), by="exchange", stays=False
    ),
    "replaced, with templates": Case(
        before=lambda f: save(f, 1, per_shard=1),
        do=lambda f: replace(f, 2),
        by="exchange",
        stays=False,
        others={**OTHERS, "additional_chat_templates/tools.jinja": "x"},
    ),
}
