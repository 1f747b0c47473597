"""Malformed .bin files raise, and are never read as other values."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from monoblock.checkpoint.hub import WeightFiles
from monoblock.checkpoint.store import Store, open_store
from monoblock.errors import CheckpointError

# (a record's name, its bytes) -> its bytes, or None to leave it out, and how they are stored
Change = Callable[[str, bytes], tuple[bytes | None, int]]


def opened(path: Path) -> Store:
    return open_store(WeightFiles(kind="bin", paths=(path,)), "pt")


def rewritten(path: Path, change: Change) -> Path:
    """The archive with its records changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content, kind = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content, kind)
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({f"layer.{i}": torch.nn.Parameter(torch.ones(64, 64)) for i in range(9)}, tmp_path / "w.bin")
    return tmp_path / "w.bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, body: (body, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (
            lambda name, body: (body[:100] if name.endswith("data/7") else body, zipfile.ZIP_STORED),
            "and has 100",
        ),
        (lambda name, body: (None if name.endswith("data/7") else body, zipfile.ZIP_STORED), "is missing"),
    ],
    ids=["deflated", "cut", "gone"],
)
def test_incomplete_archives_raise(saved: Path, change: Change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(rewritten(saved, change))


def test_archive_of_parameters(saved: Path) -> None:
    store = opened(rewritten(saved, lambda name, body: (body, zipfile.ZIP_STORED)))
    assert len(store) == 9
    assert all(
        bool((store.tensor(name) == 1).all()) and not store.tensor(name).requires_grad for name in store
    )


def test_expanded_storages_raise(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(2**40)}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match="needs more than the 4 bytes"):
        opened(tmp_path / "w.bin")
