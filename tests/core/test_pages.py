"""Zero-copy concatenation of tensors of a file by mapping their pages next to each other."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest

from monoblock.checkpoint import pages
from monoblock.checkpoint.hub import WeightFiles
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import Store, open_store

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="pages can be mapped next to each other on Linux only"
)
WIDTH = 1024  # a row of float32 is a page of 4 KiB


def stored(folder: Path, **rows: int) -> tuple[Store, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((count, WIDTH), dtype=np.float32) for name, count in rows.items()}
    save_tensors(folder, arrays, framework="np", max_shard_size="50GB", extra_files={})
    return open_store(WeightFiles(kind="safetensors", paths=(folder / "model.safetensors",)), "np"), arrays


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MIN_BYTES", 0)


def test_joined_tensors_equal_their_concatenation(tmp_path: Path) -> None:
    """In any order and at any page offset; writes are private to the mapping."""
    store, arrays = stored(tmp_path, a=3, b=1, c=2)
    for names in (("c", "a", "b"), ("a", "b", "c"), ("b", "b")):
        expected = np.concatenate([arrays[name] for name in names])
        joined = store.concatenated(names)
        assert np.array_equal(joined, expected)
        assert joined.base is not None
        joined += 1
        assert np.array_equal(store.concatenated(names), expected)
        assert np.array_equal(store.tensor(names[0]), arrays[names[0]])
    del joined
    gc.collect()
    assert np.array_equal(store.concatenated(("a", "c")), np.concatenate([arrays["a"], arrays["c"]]))


def test_tensors_that_cannot_be_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that do not end at a page boundary, are smaller than a page, differ in dtype, or are small in all."""
    arrays = {
        "a": np.ones((WIDTH + 1, 5), np.float32),
        "b": np.ones((2, 5), np.float32),
        "c": np.ones((2, 5), np.int32),
        "d": np.ones((3, 5), np.float32),
    }
    save_tensors(tmp_path, arrays, framework="np", max_shard_size="50GB", extra_files={})
    store = open_store(WeightFiles(kind="safetensors", paths=(tmp_path / "model.safetensors",)), "np")
    for names in (("a", "d"), ("b", "d"), ("b", "c")):
        assert store.concatenated(names) is None
    (tmp_path / "more").mkdir()
    store, _ = stored(tmp_path / "more", a=1, b=1)
    assert store.concatenated(("a", "b")) is not None
    monkeypatch.setattr(pages, "MIN_BYTES", 1 << 20)
    assert store.concatenated(("a", "b")) is None
