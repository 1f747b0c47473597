"""Staging folders: hidden, randomly named folders into which a save writes files before they replace the old ones."""

import os
import secrets
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from monoblock.checkpoint import journal
from monoblock.checkpoint.journal import FILES, STAGE, Journal, names_in
from monoblock.checkpoint.locks import locked
from monoblock.errors import CheckpointError


def new_stage(folder: Path) -> Path:
    """An empty hidden folder of this process: in the parent of `folder` if files can be renamed from there, else in
    it."""
    name = _stage_name()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder.parent)
        stage = folder.parent / name
        stage.mkdir(mode=0o700)
        return stage
    with locked(folder):
        journal.complete(folder)
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


def _remove_orphans(parent: Path) -> None:
    """Remove the staging folders of this user's dead processes on this host."""
    with suppress(OSError):
        for path in list(parent.glob(f"{STAGE}*")):
            host, _, process = path.name.removeprefix(STAGE).rpartition("-")[0].rpartition("-")
            if host != socket.gethostname() or not process.isdecimal() or alive(int(process)):
                continue
            with suppress(OSError):
                if os.name == "nt" or path.lstat().st_uid == os.geteuid():
                    clear(path)


def alive(pid: int) -> bool:
    """Whether process `pid` runs on this host; True where that cannot be determined."""
    if os.name == "nt":  # os.kill(pid, 0) would terminate the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def clear(stage: Path) -> None:
    """Remove a staging folder in any state."""
    with suppress(OSError, CheckpointError):
        found = journal.read(stage)
        if found is not None and found.replaced == identity(stage / FILES):
            with locked(stage.parent / found.folder):
                finish_exchange(stage, found)
    shutil.rmtree(stage, ignore_errors=True)


def finish_exchange(stage: Path, done: Journal) -> None:
    """Remove the replaced folder, which the exchange moved into the stage. Files that another program wrote there after
    the files were linked are moved into the new folder."""
    old, folder = stage / FILES, stage.parent / done.folder
    for name in names_in(old):
        path = old / name
        linked = name in done.kept and (path.is_symlink() or path.lstat().st_ino == done.kept[name])
        if linked or name in done.put or name in done.remove:
            path.unlink()
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(folder / name)
    journal.drop(stage)


@contextmanager
def scratch(target: Path) -> Generator[Path, None, None]:
    """An empty hidden folder next to `target`, removed when the block ends. CheckpointError if it cannot be
    created."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target.parent)
        stage = target.parent / _stage_name()
        stage.mkdir(mode=0o700)
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {target.parent}: {error.strerror or error}; choose another folder"
        ) from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def identity(path: Path) -> list[int]:
    """The device and inode numbers of a path; links are followed."""
    found = path.stat()
    return [found.st_dev, found.st_ino]
