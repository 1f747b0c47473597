"""Atomic saves: after a save, a folder holds either all the new files or all the old ones.

New files are written into a *stage*, a hidden, randomly named folder next to the target, or inside it if its parent is
not writable or on another file system. A new target is created by one rename. An existing target is updated under its
lock (`locks.py`) by the first applicable method:

1. One rename, if a single file changes and none is removed.
2. An atomic exchange of the target with the stage (`exchange.py`), after hard-linking the target's other files into it.
   Not applicable if the target has subfolders, which cannot be linked, or is the working directory of a process, which
   would stay in the old folder.
3. A journal (`journal.py`): the stage, with a list of the changes, is renamed to `.monoblock-commit` in the target, and
   the files are moved one by one. If that is interrupted, the next load or save completes it; in a read-only folder, a
   load reads the staged files. config.json is absent meanwhile, so that a program that does not know the journal fails
   instead of reading old and new files together.

Stages of killed processes are removed by the next save.
"""

import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from monoblock.checkpoint.exchange import exchange
from monoblock.checkpoint.journal import COMMIT, FILES, Journal, check_place, complete, drop, names_in, sync
from monoblock.checkpoint.locks import LOCK, locked
from monoblock.checkpoint.stages import clear, finish_exchange, identity, new_stage
from monoblock.errors import CheckpointError, HubError

SAVE_ID = "save_id"  # the metadata key, in shards and their index, of the id of the save

_COMPARED = 1 << 20  # bytes up to which a file is compared with the one it replaces
_LINKED = 1000  # entries up to which a folder is exchanged


class Staging:
    """New files for one folder: write them with `open`, `write` or directly into `files`, then `commit` or `discard`.

    Names are relative to the folder and use slashes. `whole`: the commit removes every other file of the folder.
    """

    def __init__(self, folder: Path, *, whole: bool = False):
        self.folder = Path(os.path.realpath(folder))
        self._whole = whole
        self._stale: list[re.Pattern[str]] = []
        self._stage = new_stage(self.folder)
        self.files = self._stage / FILES
        try:
            self.files.mkdir()
        except BaseException:
            self.discard()
            raise
        _open_stages.add(self.files)

    def open(self, name: str) -> BinaryIO:
        """Create a file and open it for writing bytes."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = (
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        )
        return os.fdopen(os.open(path, flags, 0o666), "wb")

    def write(self, name: str, content: str | bytes) -> None:
        """Create a file with this content; text is encoded as UTF-8."""
        with self.open(name) as file:
            file.write(content if isinstance(content, bytes) else content.encode())

    def remove(self, stale: re.Pattern[str]) -> None:
        """On commit, remove files whose names match, unless they are written by this save."""
        self._stale.append(stale)

    def commit(self) -> None:
        """Flush the files to disk and move them into the folder. On OSError or CheckpointError, the folder is unchanged
        unless the message explains what remains to be done."""
        names = names_in(self.files)
        _sync_tree(self.files)
        if not self._became_the_folder():
            with locked(self.folder):
                complete(self.folder)
                self._put(names)
        self.discard()

    def discard(self) -> None:
        """Remove the staged files; without a commit, the folder is unchanged."""
        _open_stages.discard(self.files)
        clear(self._stage)

    def _became_the_folder(self) -> bool:
        if self.folder.exists():
            return False
        try:
            self.files.rename(self.folder)
        except OSError:
            if self.folder.exists():  # another save made it meanwhile
                return False
            raise
        with _in_place(self.folder):
            sync(self.folder.parent)
        return True

    def _put(self, names: list[str]) -> None:
        there = names_in(self.folder) if self._whole else [path.name for path in self.folder.iterdir()]
        gone = [
            n for n in there if n not in names and (self._whole or any(p.fullmatch(n) for p in self._stale))
        ]
        journal = Journal(
            put=[name for name in names if not _same(self.files / name, self.folder / name)],
            remove=gone,
            folder=self.folder.name,
            replaced=identity(self.folder),
        )
        for name in (*journal.put, *gone):
            check_place(self.folder, name)
        if not journal.put and not gone:
            return
        if len(journal.put) == 1 and not gone:
            (name,) = journal.put
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.files / name).replace(self.folder / name)
            with _in_place(self.folder):
                sync((self.folder / name).parent)
        elif not self._exchanged(journal, names):
            self._by_journal(journal)

    def _exchanged(self, journal: Journal, names: list[str]) -> bool:
        """Try to exchange the folder with the stage; False if that is not possible."""
        if self._stage.parent == self.folder or not _exchangeable(self.folder, self._whole):
            return False
        kept = {path.name for path in self.folder.iterdir()} - {*names, *journal.remove}
        if self._whole:
            kept = {LOCK}  # processes may be waiting for it
        try:
            for name in kept:
                if not _link(self.folder / name, self.files / name):
                    return False
                journal.kept[name] = (self.folder / name).lstat().st_ino
            shutil.copystat(self.folder, self.files)
            if os.name != "nt" and _owner(self.folder) != _owner(self.files):
                os.chown(self.files, *_owner(self.folder))
            journal.put = names
            journal.write(self._stage)
            sync(self.files)
            exchange(self.files, self.folder)
        except OSError:
            drop(self._stage)
            return False
        with _in_place(self.folder):
            sync(self.folder.parent)
            finish_exchange(self._stage, journal)
        return True

    def _by_journal(self, journal: Journal) -> None:
        journal.write(self._stage)
        self._stage.chmod(stat.S_IMODE(self.folder.stat().st_mode))  # other users may have to read from it
        self._stage.rename(self.folder / COMMIT)
        try:
            sync(self.folder)
            complete(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"the save into {self.folder} is not complete ({error.strerror or error}): the remaining files are in "
                f"{COMMIT}, and the next load or save moves them into place"
            ) from error


# Open stages of this process: a save into one of them is part of its transaction.
_open_stages: set[Path] = set()


class _Inner(Staging):
    """A save into a folder that is itself part of an uncommitted save."""

    def __init__(self, folder: Path):
        self.folder = self.files = folder
        self._stale = []
        self._new: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, name: str) -> BinaryIO:
        self._new.add(name)
        (self.files / name).unlink(missing_ok=True)
        return super().open(name)

    def commit(self) -> None:
        for path in list(self.folder.iterdir()):
            if path.name not in self._new and any(stale.fullmatch(path.name) for stale in self._stale):
                path.unlink()

    def discard(self) -> None:
        pass  # discarded with the outer save


def _is_open(folder: Path) -> bool:
    return any(path in _open_stages for path in (folder, *folder.parents))


@contextmanager
def _in_place(folder: Path) -> Generator[None, None, None]:
    """For steps after the new files are in place: an OSError becomes a CheckpointError that reports this."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds all the new files, but the last step of the save failed: {_reason(error)}"
        ) from error


@contextmanager
def staged(folder: str | Path, *, whole: bool = False) -> Generator[Staging, None, None]:
    """A `Staging` that is committed when the block succeeds and discarded on any exception, including Ctrl-C.

    An `OSError` (disk full, folder not writable) becomes a `CheckpointError` that names the folder.
    """
    if _is_open(real := Path(os.path.realpath(folder))):
        inner = _Inner(real)
        yield inner
        inner.commit()
        return
    try:
        stage = Staging(Path(folder), whole=whole)
    except OSError as error:
        raise CheckpointError(
            f"cannot save into {folder}: {_reason(error)}; choose another folder"
        ) from error
    try:
        yield stage
        stage.commit()
    except HubError:
        raise  # a download failed, not the save
    except OSError as error:
        raise CheckpointError(
            f"saving into {folder} failed: {_reason(error)}; the folder is unchanged"
        ) from error
    finally:
        stage.discard()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write one file by `write(temporary_path)`; `path` holds the old content or the new, never a part of it."""
    path = Path(path)
    with staged(path.parent) as stage:
        stage.open(path.name).close()
        write(stage.files / path.name)
    return path


# ---------------------------------------------------------------------- the exchange


def _exchangeable(folder: Path, whole: bool) -> bool:
    """Whether a folder may be exchanged; unless `whole`, its entries must be linkable and at most `_LINKED`."""
    mine = folder.stat()
    if os.name == "nt" or mine.st_uid != os.geteuid():
        return False
    if not whole:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= _LINKED or entry.is_dir(follow_symlinks=False):
                    return False
    return not any(os.path.samestat(mine, other) for other in _working_folders())


def _working_folders() -> Iterable[os.stat_result]:
    """The working directories of this process and of all processes whose one can be read."""
    with suppress(OSError):
        yield Path().stat()
    if sys.platform == "linux":
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                with suppress(OSError):
                    yield (process / "cwd").stat()


def _link(source: Path, target: Path) -> bool:
    mode = source.lstat().st_mode
    if stat.S_ISLNK(mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(mode):
        os.link(source, target)
    else:
        return False
    return True


def _same(new: Path, old: Path) -> bool:
    """Whether a small file already has the new content."""
    try:
        there = old.lstat()
        return (
            stat.S_ISREG(there.st_mode)
            and there.st_size <= _COMPARED
            and there.st_size == new.stat().st_size
            and old.read_bytes() == new.read_bytes()
        )
    except OSError:
        return False


def _owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            if not (Path(parent) / name).is_symlink():
                sync(Path(parent) / name)
        sync(Path(parent))
