"""A folder that appears whole or not at all."""

import os
import shutil
import socket
import tarfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from monoblock.checkpoint.files import alive, write_atomically
from monoblock.errors import CheckpointError, HubError

_SUFFIX = ".monoblock-tmp"


@contextmanager
def new_folder(target: Path, *, replace: bool) -> Generator[Path, None, None]:
    """An empty folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    A target that holds files is refused, unless `replace`; then those files are deleted once the new ones are
    complete. One with sub-folders, or a parent of the working folder, is never replaced: that is no model's.
    """
    check_target(target, replace=replace)
    with scratch_folder(target, "new") as folder:
        try:
            yield folder
            _put_in_place(folder, target)
        except HubError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"writing {target} failed: {reason}; what was there before is unchanged"
            ) from error


def check_target(target: Path, *, replace: bool) -> None:
    """CheckpointError if `new_folder` would refuse the target."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is a file or a link: give the name of a new folder")
    content = sorted(target.iterdir()) if target.is_dir() else []
    if content and not replace:
        raise CheckpointError(
            f"{target} holds files already ({content[0].name}, ...): choose a new folder, or replace it with --force "
            "(force=True)"
        )
    if folders := [path for path in content if path.is_dir() and path.name != "additional_chat_templates"]:
        raise CheckpointError(
            f"{target} is not replaced: it has a sub-folder ({folders[0].name}), and a model's folder has none; "
            "choose a new folder"
        )


def _put_in_place(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_name(folder.name.replace(".new-", ".old-"))
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(target: Path, purpose: str) -> Generator[Path, None, None]:
    """A hidden folder beside `target`, gone when the block ends; those of killed processes go first."""
    owner = f"{socket.gethostname()}-{os.getpid()}"
    folder = target.with_name(f".{target.name}.{purpose}-{owner}{_SUFFIX}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target)
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {target.parent}: {error.strerror}; choose another place"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans(target: Path) -> None:
    for path in target.parent.glob(f".{target.name}.*{_SUFFIX}"):
        host, _, pid = path.name.removesuffix(_SUFFIX).rpartition("-")
        new = path.name.startswith(f".{target.name}.new-") or path.name.startswith(
            f".{target.name}.unpacked-"
        )
        if new and host.endswith(f"-{socket.gethostname()}") and pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def unpacked(source: Path, target: Path) -> Generator[Path, None, None]:
    """The content of a tar file in a folder beside `target`; anything else is given back as it is."""
    if not (source.is_file() and (source.suffix == ".tgz" or ".tar" in source.suffixes[-2:])):
        yield source
        return
    with scratch_folder(target, "unpacked") as folder:
        try:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")  # refuses links and paths that lead outside
        except (tarfile.TarError, EOFError, OSError) as error:
            raise CheckpointError(f"{source} cannot be unpacked ({error}): fetch it again") from error
        inner = list(folder.iterdir())
        yield inner[0] if len(inner) == 1 and inner[0].is_dir() else folder


def copy_files(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy files into the folder under the given names."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, lambda temporary, path=path: shutil.copyfile(path, temporary))
