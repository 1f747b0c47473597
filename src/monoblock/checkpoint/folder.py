"""A folder that appears whole or not at all."""

import shutil
import tarfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from monoblock.checkpoint.journal import hidden
from monoblock.checkpoint.stages import scratch
from monoblock.checkpoint.transaction import staged, write_atomically
from monoblock.errors import CheckpointError


@contextmanager
def new_folder(target: Path, *, replace: bool) -> Generator[Path, None, None]:
    """An empty folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    A target that holds files is refused, unless `replace`; then those files are deleted once the new ones are
    complete. One with sub-folders, or a parent of the working folder, is never replaced: that is no model's.
    """
    check_target(target, replace=replace)
    with staged(target, whole=True) as stage:
        yield stage.files


def check_target(target: Path, *, replace: bool) -> None:
    """CheckpointError if `new_folder` would refuse the target."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is a file or a link: give the name of a new folder")
    content = [path for path in sorted(target.iterdir()) if not hidden(path.name)] if target.is_dir() else []
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


@contextmanager
def unpacked(source: Path, target: Path) -> Generator[Path, None, None]:
    """The content of a tar file in a folder beside `target`; anything else is given back as it is."""
    if not (source.is_file() and (source.suffix == ".tgz" or ".tar" in source.suffixes[-2:])):
        yield source
        return
    with scratch(target) as folder:
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
