"""A save as one transaction: afterwards a folder holds all the new files or all the old ones.

The new files are written into a *stage*, a hidden folder of a random name beside the target, or inside it where the
place beside it is not writable or another file system. A folder that is not there yet is then made by one rename.
Into one that is there they come under its lock (`locks.py`), by the first of these that can be done:

1. One rename, where a single file changes and none goes.
2. An exchange of the folder for the new one (`exchange.py`), into which its other files were linked before. Not where
   it has sub-folders, which cannot be linked, or is the working folder of a process, which would stay in the old one.
3. A journal: the stage with the list of what is to happen is renamed to `.monoblock-commit` in the folder, and then
   the files are put in place one by one. Whoever loads or saves next completes that (`settle`) if it was cut off, and
   in a folder that cannot be written to reads the files where they are (`located`). While it goes on, config.json is
   not there, so that a program which knows no journal fails rather than reads old and new files together.

Stages of killed processes are removed by the next save.
"""

import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from monoblock.checkpoint.exchange import exchange
from monoblock.checkpoint.locks import LOCK, locked
from monoblock.errors import CheckpointError, HubError

COMMIT = ".monoblock-commit"  # in a folder: the stage whose files are being put in place
STAGE = ".monoblock-save-"  # then the host, the process and a random number
SAVE_ID = "save_id"  # the key in the metadata of shards and of their index that says which save wrote them

_JOURNAL = "journal.json"
_FILES = "files"  # the folder of a stage that has the new files, and after an exchange the old ones
_ENTRY = "config.json"  # what every reader of a model looks for first
_COMPARED = 1 << 20  # bytes up to which a file that stays as it is counts as unchanged
_LONGEST = 16 << 20  # bytes of a journal
_TRIES = 10  # looks at a folder that is being saved to
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
        self._stage = _new_stage(self.folder)
        self.files = self._stage / _FILES
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
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
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
        names = _names(self.files)
        _sync_tree(self.files)
        if not self._became_the_folder():
            with locked(self.folder):
                _complete(self.folder)
                self._put(names)
        self.discard()

    def discard(self) -> None:
        """Remove what was written; a folder that was not committed to stays as it was."""
        _open_stages.discard(self.files)
        shutil.rmtree(self._stage, ignore_errors=True)

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
            _sync(self.folder.parent)
        return True

    def _put(self, names: list[str]) -> None:
        there = _names(self.folder) if self._whole else [path.name for path in self.folder.iterdir()]
        gone = [n for n in there if n not in names and (self._whole or any(p.fullmatch(n) for p in self._stale))]
        journal = _Journal(
            put=[name for name in names if not _same(self.files / name, self.folder / name)],
            remove=gone,
            folder=self.folder.name,
            replaced=_identity(self.folder),
        )
        for name in (*journal.put, *gone):
            _check_place(self.folder, name)
        if not journal.put and not gone:
            return
        if len(journal.put) == 1 and not gone:
            (name,) = journal.put
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.files / name).replace(self.folder / name)
            with _in_place(self.folder):
                _sync((self.folder / name).parent)
        elif not self._exchanged(journal, names):
            self._by_journal(journal)

    def _exchanged(self, journal: "_Journal", names: list[str]) -> bool:
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
            self._write_journal(journal)
            _sync(self.files)
            exchange(self.files, self.folder)
        except OSError:
            (self._stage / _JOURNAL).unlink(missing_ok=True)
            return False
        with _in_place(self.folder):
            _sync(self.folder.parent)
            _finish_exchange(self._stage, journal)
        return True

    def _by_journal(self, journal: "_Journal") -> None:
        self._write_journal(journal)
        self._stage.chmod(stat.S_IMODE(self.folder.stat().st_mode))  # others may have to read there
        self._stage.rename(self.folder / COMMIT)
        try:
            _sync(self.folder)
            _complete(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"the save into {self.folder} is not complete ({error.strerror or error}): what is missing is in "
                f"{COMMIT}, and the next load or save puts it in place"
            ) from error

    def _write_journal(self, journal: "_Journal") -> None:
        with (self._stage / _JOURNAL).open("x", encoding="utf-8") as file:
            json.dump(asdict(journal), file)
            file.flush()
            os.fsync(file.fileno())
        _sync(self._stage)


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


@contextmanager
def scratch(beside: Path) -> Generator[Path, None, None]:
    """An empty hidden folder in the parent of that path, gone when the block ends. CheckpointError if it cannot be
    made."""
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(beside.parent)
        stage = beside.parent / _stage_name()
        stage.mkdir(mode=0o700)
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {beside.parent}: {_reason(error)}; choose another place"
        ) from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


# ---------------------------------------------------------------------- reading after a save that was cut off


def settle(folder: Path) -> None:
    """Complete a save that was cut off after its commit, if there is one and the folder can be written to.

    CheckpointError: there is a journal that no save wrote.
    """
    if not os.path.lexists(folder / COMMIT):
        return
    with suppress(OSError), locked(folder):
        _complete(folder)


def located(folder: Path, name: str) -> Path | None:
    """A file of a folder, None if it is not there; a save that was cut off is completed first, or, in a folder that
    cannot be written to, its files are those that count."""
    path, commit = folder / name, folder / COMMIT
    for _ in range(_TRIES):
        if os.path.lexists(commit):
            settle(folder)
            if (journal := _read_journal(commit)) is not None:
                if name in journal.put and _plain(folder, commit / _FILES / name):
                    return commit / _FILES / name
                if name in journal.remove:
                    return None
        if path.is_file():
            return path
        if not os.path.lexists(commit):  # else a save began just now, and may have removed the file to replace it
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


# ---------------------------------------------------------------------- the journal


@dataclass(kw_only=True)
class _Journal:
    """What a commit does in the folder: which files are put there, which are removed; for an exchange, which files of
    others were linked, with their inodes, and the device and inode of the folder that was replaced."""

    put: list[str]
    remove: list[str]
    folder: str
    replaced: list[int]
    kept: dict[str, int] = field(default_factory=dict[str, int])


def _read_journal(stage: Path) -> _Journal | None:
    """The journal of a stage, None without one. CheckpointError if it cannot be one of ours: nothing is renamed or
    removed by a list that came with a folder from elsewhere."""
    path = stage / _JOURNAL
    try:
        found = path.lstat()
        if stage.is_symlink() or not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST:
            raise ValueError("a link, or no journal")
        journal = _Journal(**json.loads(path.read_bytes()))
        if not isinstance(journal.put, list) or not isinstance(journal.remove, list):
            raise ValueError("no lists of names")
        names = [*journal.put, *journal.remove, *journal.kept]
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


def _complete(folder: Path) -> None:
    """Do what is left of a journal, under the folder's lock; as often as it takes."""
    commit = folder / COMMIT
    journal = _read_journal(commit)
    if journal is not None:
        entry = [name for name in journal.put if name == _ENTRY]
        if entry and _plain(folder, commit / _FILES / _ENTRY):
            (folder / _ENTRY).unlink(missing_ok=True)
        _put_in_place(folder, [name for name in journal.put if name != _ENTRY])
        for name in journal.remove:
            if _plain(folder, folder / name):
                (folder / name).unlink()
        _put_in_place(folder, entry)
        for place in {(folder / name).parent for name in journal.put}:
            _sync(place)
        (commit / _JOURNAL).unlink()
    if os.path.lexists(commit):
        if commit.is_symlink() or not commit.is_dir():
            raise CheckpointError(f"{commit} is not what a save leaves behind: remove it if you do not know it")
        shutil.rmtree(commit)


def _put_in_place(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        staged = folder / COMMIT / _FILES / name
        if _plain(folder, staged):
            _check_place(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(folder / name)


def _check_place(folder: Path, name: str) -> None:
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


def _finish_exchange(stage: Path, journal: _Journal) -> None:
    """Remove the replaced folder, which now is the stage's. What another program wrote there after the files were
    linked moves into the new one."""
    old, folder = stage / _FILES, stage.parent / journal.folder
    done = {*journal.put, *journal.remove}
    for name in _names(old):
        path = old / name
        linked = name in journal.kept and (path.is_symlink() or path.lstat().st_ino == journal.kept[name])
        if name in done or linked:
            path.unlink()
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(folder / name)
    shutil.rmtree(stage, ignore_errors=True)


# ---------------------------------------------------------------------- stages


def _new_stage(folder: Path) -> Path:
    """An empty hidden folder, only for this process; beside the folder if its files can be renamed from there."""
    name = _stage_name()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder.parent)
        stage = folder.parent / name
        stage.mkdir(mode=0o700)
        return stage
    with locked(folder):
        _complete(folder)
        inside, outside = folder / name, folder.parent / name
        inside.mkdir(mode=0o700)
        try:
            inside.rename(outside)
        except OSError:
            outside = inside
    _remove_orphans(folder)
    _remove_orphans(folder.parent)
    return outside


def _stage_name() -> str:
    return f"{STAGE}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"


def _remove_orphans(place: Path) -> None:
    """Remove the stages of this user's dead processes on this machine."""
    with suppress(OSError):
        for path in list(place.glob(f"{STAGE}*")):
            host, _, process = path.name.removeprefix(STAGE).rpartition("-")[0].rpartition("-")
            if host != socket.gethostname() or not process.isdecimal() or alive(int(process)):
                continue
            with suppress(OSError, CheckpointError):
                if os.name != "nt" and path.lstat().st_uid != os.geteuid():
                    continue
                journal = _read_journal(path)
                if journal is not None and journal.replaced == _identity(path / _FILES):
                    with locked(place / journal.folder):
                        _finish_exchange(path, journal)
                else:
                    shutil.rmtree(path)


def alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine (yes, where that cannot be asked)."""
    if os.name == "nt":  # there os.kill(pid, 0) would end the process instead of asking after it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# ---------------------------------------------------------------------- files


def _names(folder: Path) -> list[str]:
    """The files below a folder and its links, by their relative names; not those that saves use for themselves."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if not hidden(name)]
        found += [(here / name).relative_to(folder).as_posix() for name in (*files, *linked) if not hidden(name)]
    return sorted(found)


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


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino]


def _owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            if not (Path(place) / name).is_symlink():
                _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    """Wait until `path` is on the disk, where the platform can say so."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no fsync of a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
