"""The journal of a save: the changes to a folder, so that they can be completed if the saving process is killed.

Renaming a stage (`stages.py`) to `.monoblock-commit` in the folder commits the save. Its files are then moved one by
one; `settle` completes an interrupted save, and `located` finds a file in the meantime.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from monoblock.checkpoint.locks import LOCK, locked
from monoblock.errors import CheckpointError

COMMIT = ".monoblock-commit"  # in a folder: the committed stage whose files are being moved
STAGE = ".monoblock-save-"  # followed by host, process id and a random number
FILES = "files"  # the folder of a stage with the new files; after an exchange, with the old ones

_JOURNAL = "journal.json"
_ENTRY = "config.json"  # the file that every reader of a model opens first
_MAX_BYTES = 16 << 20  # of a journal
_TRIES = 10  # lookups in a folder during a save


@dataclass(kw_only=True)
class Journal:
    """The changes of a commit: files to `put` and to `remove`, and the folder's name. For an exchange: the device and
    inode of the `replaced` folder, and the inodes of the files `kept` by hard links."""

    put: list[str]
    remove: list[str]
    folder: str
    replaced: list[int]
    kept: dict[str, int] = field(default_factory=dict[str, int])

    def write(self, stage: Path) -> None:
        """Write to a stage and flush to disk."""
        with (stage / _JOURNAL).open("x", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        sync(stage)


def drop(stage: Path) -> None:
    """Remove the journal of a stage."""
    (stage / _JOURNAL).unlink(missing_ok=True)


def read(stage: Path) -> Journal | None:
    """The journal of a stage, or None. CheckpointError if it is not valid: a journal that came with an untrusted folder
    must not rename or remove files outside it."""
    path = stage / _JOURNAL
    try:
        found = path.lstat()
        if stage.is_symlink() or not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            raise ValueError("a link, or too large")
        fields = cast(dict[str, Any], json.loads(path.read_bytes()))
        journal = Journal(**fields)
        if not all(isinstance(fields[name], list) for name in ("put", "remove")):
            raise ValueError("not lists of names")
        names = cast(list[object], [*journal.put, *journal.remove, *journal.kept])
        if not all(isinstance(name, str) and _is_inside(name) for name in names) or "/" in journal.folder:
            raise ValueError("a path outside the folder")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{stage} is no valid journal of a save ({error}): remove it") from error
    return journal


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name)
    return bool(parts.name) and not parts.is_absolute() and ".." not in parts.parts and "\\" not in name


def complete(folder: Path) -> None:
    """Apply the remaining changes of a journal. Idempotent; the caller holds the folder's lock."""
    commit = folder / COMMIT
    journal = read(commit)
    if journal is not None:
        entry = [name for name in journal.put if name == _ENTRY]
        if entry and _plain(folder, commit / FILES / _ENTRY):
            (folder / _ENTRY).unlink(missing_ok=True)
        _put_in_place(folder, [name for name in journal.put if name != _ENTRY])
        for name in journal.remove:
            if _plain(folder, folder / name):
                (folder / name).unlink()
        _put_in_place(folder, entry)
        for parent in {(folder / name).parent for name in journal.put}:
            sync(parent)
        (commit / _JOURNAL).unlink()
    if os.path.lexists(commit):
        if commit.is_symlink() or not commit.is_dir():
            raise CheckpointError(f"{commit} is no valid journal of a save: remove it")
        shutil.rmtree(commit)


def _put_in_place(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        staged = folder / COMMIT / FILES / name
        if _plain(folder, staged):
            check_place(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(folder / name)


def check_place(folder: Path, name: str) -> None:
    """CheckpointError if a file cannot be written at `name`: a folder has this name, or a parent is a file or a
    link."""
    path = folder / name
    for parent in path.relative_to(folder).parents:
        above = folder / parent
        if parent.name and os.path.lexists(above) and (above.is_symlink() or not above.is_dir()):
            raise CheckpointError(f"{above} is a file or a link: {name} cannot be written below it")
    if path.is_dir() and not path.is_symlink():
        raise CheckpointError(f"{path} is a folder, but a file is to be written there: remove it")


def _plain(folder: Path, path: Path) -> bool:
    """Whether `path` is a file or a link below `folder`, with no link among its parents."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode) and _real_parents(folder, path)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _real_parents(folder: Path, path: Path) -> bool:
    parents = path.relative_to(folder).parents
    return all(stat.S_ISDIR((folder / parent).lstat().st_mode) for parent in parents if parent.name)


def settle(folder: Path) -> None:
    """Complete a committed save that was interrupted, if the folder is writable.

    CheckpointError: the journal is not valid.
    """
    if not os.path.lexists(folder / COMMIT):
        return
    with suppress(OSError), locked(folder):
        complete(folder)


def located(folder: Path, name: str) -> Path | None:
    """The path of a file in a folder, or None. An interrupted save is completed first; in a read-only folder, its
    staged files are returned instead."""
    path, commit = folder / name, folder / COMMIT
    for _ in range(_TRIES):
        if os.path.lexists(commit):
            settle(folder)
            if (journal := read(commit)) is not None:
                if name in journal.put and _plain(folder, commit / FILES / name):
                    return commit / FILES / name
                if name in journal.remove:
                    return None
        if path.is_file():
            return path
        # With a commit, a save began just now and may have removed the file to replace it.
        if not os.path.lexists(commit):
            return None
    return None


def version(folder: Path) -> tuple[object, ...]:
    """A value that changes when a model is saved into the folder, also while a journal is being completed. A save that
    changes a single file changes it only if that file is config.json."""
    found: list[tuple[int, ...] | None] = []
    for path in (folder, folder / _ENTRY, folder / COMMIT):
        try:
            there = path.stat(follow_symlinks=path != folder / COMMIT)
        except OSError:
            found.append(
                None
            )  # config.json is absent during each commit: its absence alone tells none from another
            continue
        # Writing any file, such as a lock, changes the time of the folder itself.
        found.append((there.st_dev, there.st_ino, 0 if path is folder else there.st_mtime_ns))
    return tuple(found)


def hidden(name: str) -> bool:
    """Whether a name is reserved for the lock, the stages and the journal of saves."""
    return name in (COMMIT, LOCK) or name.startswith(STAGE)


def names_in(folder: Path) -> list[str]:
    """Relative names of all files and links below a folder, except those that are `hidden`."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if not hidden(name)]
        found += [
            (here / name).relative_to(folder).as_posix() for name in (*files, *linked) if not hidden(name)
        ]
    return sorted(found)


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no fsync for folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
