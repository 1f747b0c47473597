"""Plain files: JSON that explains itself when broken, and writes that happen whole or not at all."""

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.json_text import parsed
from monoblock.errors import CheckpointError


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` names the file and the place where it breaks."""
    path = Path(path)
    try:
        content: object = parsed(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; expected an object {{...}}")
    return cast(dict[str, Any], content)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


class Staging:
    """Files of one folder that are written under temporary names and put in place together.

    `path(name)` gives the temporary path to write for `name`. `commit()` makes every file durable (fsync),
    then renames them in the order in which they were asked for: a reader that needs an index finds it
    complete, because it comes last. `discard()` removes what was written. Temporary files that a killed
    process left in the folder are removed when the next `Staging` opens there.
    """

    _SUFFIX = ".monoblock-tmp"

    def __init__(self, folder: Path):
        self.folder = folder
        self._owner = f"{socket.gethostname()}-{os.getpid()}"
        self._names: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_orphans()

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        if name not in self._names:
            self._names.append(name)
        return self.folder / f".{name}.{self._owner}{self._SUFFIX}"

    def commit(self) -> list[Path]:
        """Put every staged file in place and return the final paths, in order."""
        for name in self._names:
            _sync(self.path(name))
        final = [self.folder / name for name in self._names]
        for done, target in enumerate(final):
            try:
                self.path(target.name).replace(target)
            except OSError as error:
                if not done:
                    raise
                raise CheckpointError(
                    f"{target} could not be replaced ({_reason(error)}) after other files were: save again"
                ) from error
        _sync(self.folder)
        return final

    def discard(self) -> None:
        """Remove the temporary files; what was in the folder before stays as it was."""
        for name in self._names:
            with suppress(OSError):
                self.path(name).unlink(missing_ok=True)

    def _remove_orphans(self) -> None:
        # Only those of this machine's dead processes: another rank or host may be writing here right now.
        for path in self.folder.glob(f".*{self._SUFFIX}"):
            host, _, pid = path.name.removesuffix(self._SUFFIX).rpartition("-")
            if host.endswith(f".{socket.gethostname()}") and pid.isdigit() and not alive(int(pid)):
                with suppress(OSError):
                    path.unlink()


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


def _sync(path: Path) -> None:
    """Wait until `path` is on the disk, where the platform can say so."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no fsync of a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(folder: str | Path) -> Generator[Staging, None, None]:
    """A `Staging` that commits when the block ends well and discards on any exception, Ctrl-C included.

    An `OSError` (disk full, folder not writable) becomes a `CheckpointError` that names the folder.
    """
    folder = Path(folder)
    try:
        stage = Staging(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot save into {folder}: {_reason(error)}; choose another folder"
        ) from error
    try:
        yield stage
        stage.commit()
    except OSError as error:
        stage.discard()
        raise CheckpointError(
            f"saving into {folder} failed: {_reason(error)}; what was there before is unchanged"
        ) from error
    except BaseException:
        stage.discard()
        raise


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Make one file through `write(temporary_path)`; `path` holds the old content or the new, never a
    part."""
    path = Path(path)
    with staged(path.parent) as stage:
        write(stage.path(path.name))
    return path
