"""The journal of a save: what is to happen in a folder, so that it is done whole even if the saving program is killed.

A stage (`stages.py`) that is renamed to `.monoblock-commit` in the folder is a save that is decided. Its files are put
in place one by one; `settle` does what is left of that, and `located` finds a file meanwhile.
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

COMMIT = ".monoblock-commit"  # in a folder: the stage whose files are being put in place
STAGE = ".monoblock-save-"  # then the host, the process and a random number
FILES = "files"  # the folder of a stage that has the new files, and after an exchange the old ones

_JOURNAL = "journal.json"
_ENTRY = "config.json"  # what every reader of a model looks for first
_LONGEST = 16 << 20  # bytes of a journal
_TRIES = 10  # looks at a folder that is being saved to


@dataclass(kw_only=True)
class Journal:
    """What a commit does in the folder: which files are put there, which are removed; for an exchange, which files of
    others were linked, with their inodes, and the device and inode of the folder that was replaced."""

    put: list[str]
    remove: list[str]
    folder: str
    replaced: list[int]
    kept: dict[str, int] = field(default_factory=dict[str, int])

    def write(self, stage: Path) -> None:
        """Into a stage, and onto the disk."""
        with (stage / _JOURNAL).open("x", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        sync(stage)


def drop(stage: Path) -> None:
    """Remove the journal of a stage."""
    (stage / _JOURNAL).unlink(missing_ok=True)


def read(stage: Path) -> Journal | None:
    """The journal of a stage, None without one. CheckpointError if it cannot be one of ours: nothing is renamed or
    removed by a list that came with a folder from elsewhere."""
    path = stage / _JOURNAL
    try:
        found = path.lstat()
        if stage.is_symlink() or not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST:
            raise ValueError("a link, or no journal")
        fields = cast(dict[str, Any], json.loads(path.read_bytes()))
        journal = Journal(**fields)
        if not all(isinstance(fields[name], list) for name in ("put", "remove")):
            raise ValueError("no lists of names")
        names = cast(list[object], [*journal.put, *journal.remove, *journal.kept])
        if not all(isinstance(name, str) and _is_inside(name) for name in names) or "/" in journal.folder:
            raise ValueError("a name that leads elsewhere")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{stage} is not what a save leaves behind ({error}): remove it if you do not know it"
        ) from error
    return journal


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name)
    return bool(parts.name) and not parts.is_absolute() and ".." not in parts.parts and "\\" not in name


def complete(folder: Path) -> None:
    """Do what is left of a journal, under the folder's lock; as often as it takes."""
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
        for place in {(folder / name).parent for name in journal.put}:
            sync(place)
        (commit / _JOURNAL).unlink()
    if os.path.lexists(commit):
        if commit.is_symlink() or not commit.is_dir():
            raise CheckpointError(
                f"{commit} is not what a save leaves behind: remove it if you do not know it"
            )
        shutil.rmtree(commit)


def _put_in_place(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        staged = folder / COMMIT / FILES / name
        if _plain(folder, staged):
            check_place(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(folder / name)


def check_place(folder: Path, name: str) -> None:
    """CheckpointError where a file cannot be put: a folder is there, or the way to it has a file or a link."""
    path = folder / name
    for parent in path.relative_to(folder).parents:
        place = folder / parent
        if parent.name and os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
            raise CheckpointError(f"{place} is a file or a link: {name} cannot be written behind it")
    if path.is_dir() and not path.is_symlink():
        raise CheckpointError(f"{path} is a folder, in the place of a file: remove it")


def _plain(folder: Path, path: Path) -> bool:
    """Whether there is such a file, or a link, below the folder, and the way to it has no link."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode) and _real_parents(folder, path)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _real_parents(folder: Path, path: Path) -> bool:
    parents = path.relative_to(folder).parents
    return all(stat.S_ISDIR((folder / parent).lstat().st_mode) for parent in parents if parent.name)


def settle(folder: Path) -> None:
    """Complete a save that was cut off after its commit, if there is one and the folder can be written to.

    CheckpointError: there is a journal that no save wrote.
    """
    if not os.path.lexists(folder / COMMIT):
        return
    with suppress(OSError), locked(folder):
        complete(folder)


def located(folder: Path, name: str) -> Path | None:
    """A file of a folder, None if it is not there; a save that was cut off is completed first, or, in a folder that
    cannot be written to, its files are those that count."""
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
        if not os.path.lexists(
            commit
        ):  # else a save began just now, and may have removed the file to replace it
            return None
    return None


def version(folder: Path) -> tuple[object, ...]:
    """What differs after a save of a model into the folder. One that changes a single file counts only if that is the
    config."""
    found: list[object] = [os.path.lexists(folder / COMMIT)]
    for path in (folder, folder / _ENTRY):
        with suppress(OSError):
            there = path.stat()
            found += [there.st_dev, there.st_ino, 0 if path is folder else there.st_mtime_ns]
    return tuple(found)


def hidden(name: str) -> bool:
    """Whether a file's name is one of those that saves use for themselves."""
    return name in (COMMIT, LOCK) or name.startswith(STAGE)


def names_in(folder: Path) -> list[str]:
    """The files below a folder and its links, by their relative names; not those that saves use for themselves."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if not hidden(name)]
        found += [
            (here / name).relative_to(folder).as_posix() for name in (*files, *linked) if not hidden(name)
        ]
    return sorted(found)


def sync(path: Path) -> None:
    """Wait until `path` is on the disk, where the platform can say so."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no fsync of a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
