"""A save as one transaction: afterwards a folder holds all the new files or all the old ones.

The new files are written into a *stage*, a hidden folder of a random name beside the target, or inside it where the
place beside it is not writable or another file system. A folder that is not there yet is then made by one rename.
Into one that is there they come under its lock (`locks.py`), by the first of these that can be done:

1. One rename, where a single file changes and none goes.
2. An exchange of the folder for the new one (`exchange.py`), into which its other files were linked before. Not where
   it has sub-folders, which cannot be linked, or is the working folder of a process, which would stay in the old one.
3. A journal (`journal.py`): the stage, with the list of what is to happen, is renamed to `.monoblock-commit` in the
   folder, and then the files are put in place one by one. If that is cut off, the next load or save completes it, and
   in a folder that cannot be written to, a load reads the files where they are. Meanwhile config.json is not there, so
   that a program which knows no journal fails rather than reads old and new files together.

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

SAVE_ID = "save_id"  # the key in the metadata of shards and of their index that says which save wrote them

_COMPARED = 1 << 20  # bytes up to which a file that stays as it is counts as unchanged
_LINKED = 1000  # files of others up to which a folder is exchanged


class Staging:
    """New files for one folder. `open`, `write` and `files` take them, `commit` puts them in place, `discard` drops
    them.

    Names are relative to the folder, with slashes. `whole`: every other file of the folder goes.
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
        """A new file to write bytes into."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = (
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        )
        return os.fdopen(os.open(path, flags, 0o666), "wb")

    def write(self, name: str, content: str | bytes) -> None:
        """A new file of that content; text is written as UTF-8."""
        with self.open(name) as file:
            file.write(content if isinstance(content, bytes) else content.encode())

    def remove(self, stale: re.Pattern[str]) -> None:
        """Files of the folder whose names match, and that are not written anew, go with the commit."""
        self._stale.append(stale)

    def commit(self) -> None:
        """Put the files in place; they are on the disk before. OSError or CheckpointError: the folder is unchanged, or
        the error says what is left to do."""
        names = names_in(self.files)
        _sync_tree(self.files)
        if not self._became_the_folder():
            with locked(self.folder):
                complete(self.folder)
                self._put(names)
        self.discard()

    def discard(self) -> None:
        """Remove what was written; a folder that was not committed to stays as it was."""
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
        """Whether the folder and the new one could change places."""
        if self._stage.parent == self.folder or not _exchangeable(self.folder, self._whole):
            return False
        kept = {path.name for path in self.folder.iterdir()} - {*names, *journal.remove}
        if self._whole:
            kept = {LOCK}  # for those who wait for it
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
        self._stage.chmod(stat.S_IMODE(self.folder.stat().st_mode))  # others may have to read there
        self._stage.rename(self.folder / COMMIT)
        try:
            sync(self.folder)
            complete(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"the save into {self.folder} is not complete ({error.strerror or error}): what is missing is in "
                f"{COMMIT}, and the next load or save puts it in place"
            ) from error


# The new files' folders of this process: what is saved into one is part of that transaction.
_open_stages: set[Path] = set()


class _Inner(Staging):
    """New files for a folder that is itself part of a save that is not committed yet."""

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
        pass  # with the whole


def _is_open(folder: Path) -> bool:
    return any(place in _open_stages for place in (folder, *folder.parents))


@contextmanager
def _in_place(folder: Path) -> Generator[None, None, None]:
    """What is left to do when the new files are there; an error says so."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds all the new files, but the last step of the save failed: {_reason(error)}"
        ) from error


@contextmanager
def staged(folder: str | Path, *, whole: bool = False) -> Generator[Staging, None, None]:
    """A `Staging` that commits when the block ends well and discards on any exception, Ctrl-C included.

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
        raise  # what was to be saved could not be had
    except OSError as error:
        raise CheckpointError(
            f"saving into {folder} failed: {_reason(error)}; what was there before is unchanged"
        ) from error
    finally:
        stage.discard()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Make one file through `write(temporary_path)`; `path` holds the old content or the new, never a
    part."""
    path = Path(path)
    with staged(path.parent) as stage:
        stage.open(path.name).close()
        write(stage.files / path.name)
    return path


# ---------------------------------------------------------------------- the exchange


def _exchangeable(folder: Path, whole: bool) -> bool:
    """Whether a folder may be replaced by another one, which has links to its files unless all of them go."""
    mine = folder.stat()
    if os.name == "nt" or mine.st_uid != os.geteuid():
        return False
    if not whole:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= _LINKED or entry.is_dir(follow_symlinks=False):
                    return False
    return not any(os.path.samestat(mine, place) for place in _working_folders())


def _working_folders() -> Iterable[os.stat_result]:
    """The working folders of the processes that may be asked, this one's among them."""
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
    """Whether a small file has the content already that it is to have."""
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
    for place, _, files in os.walk(folder):
        for name in files:
            if not (Path(place) / name).is_symlink():
                sync(Path(place) / name)
        sync(Path(place))
