"""Write a whole folder atomically; extract archives; copy files."""

import re
import shutil
import tarfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from monoblock.checkpoint.journal import hidden
from monoblock.checkpoint.stages import scratch
from monoblock.checkpoint.transaction import staged, write_atomically
from monoblock.errors import CheckpointError

# Folders inside a model folder: templates, exported graphs, and modules of sentence-transformers.
_FOLDERS = re.compile(r"additional_chat_templates|onnx|openvino|\d+_\w+")


@contextmanager
def new_folder(target: Path, *, replace: bool) -> Generator[Path, None, None]:
    """An empty staging folder that becomes `target` when the block succeeds and is removed otherwise.

    A target with files is refused, unless `replace`: then its files are removed when the new ones are complete. A
    target with subfolders other than those of models is never replaced, since it is no model folder.
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
    if folders := [path for path in content if path.is_dir() and not _FOLDERS.fullmatch(path.name)]:
        raise CheckpointError(
            f"{target} is not replaced: it has a subfolder ({folders[0].name}), so it is no model folder; "
            "choose a new folder"
        )


@contextmanager
def unpacked(source: Path, target: Path) -> Generator[Path, None, None]:
    """Extract a tar file into a temporary folder next to `target`; any other source is returned unchanged."""
    if not (source.is_file() and (source.suffix == ".tgz" or ".tar" in source.suffixes[-2:])):
        yield source
        return
    with scratch(target) as folder:
        try:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")  # refuses links and paths outside the folder
        except (tarfile.TarError, EOFError, OSError) as error:
            raise CheckpointError(f"{source} cannot be unpacked ({error}): fetch it again") from error
        inner = list(folder.iterdir())
        yield inner[0] if len(inner) == 1 and inner[0].is_dir() else folder


def copy_files(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy files into a folder; `files` maps name -> source path."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, lambda temporary, path=path: shutil.copyfile(path, temporary))
