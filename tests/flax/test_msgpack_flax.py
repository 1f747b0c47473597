"""msgpack files against Flax's serialisation: each reads the other's files, bitwise equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from v4_checkpoints import FLAX, FOLDER

from monoblock.checkpoint import msgpack_save
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.msgpack_save import save_msgpack
from monoblock.checkpoint.store import open_store

RNG = np.random.default_rng(0)
DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int8",
    "uint16",
    "int32",
    "int64",
    "bool",
    "complex64",
]


def arrays(dtype: str) -> dict[str, np.ndarray]:
    """Arrays by path, with sizes that use every msgpack length encoding."""
    kind = jnp.dtype(dtype)
    shapes = {"wte/embedding": (300, 70), "h/0/fc/kernel": (7, 40), "h/0/fc/bias": (40,), "ln/weight": (3,)}
    values = {name: RNG.integers(0, 2, (*shape, kind.itemsize), np.uint8) for name, shape in shapes.items()}
    return {name: value.view(kind).reshape(shapes[name]) for name, value in values.items()}


def bits(value: Any) -> tuple[Any, ...]:
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()


def opened(folder: Path) -> dict[str, tuple[Any, ...]]:
    store = open_store(find_weights(folder, prefer="msgpack"), "np")
    return {name: bits(store.tensor(name)) for name in store}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2**30, 4096])
def test_files_are_read_by_flax_and_back(
    dtype: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whole arrays, and in chunks of 4096 bytes instead of 2^30."""
    monkeypatch.setattr(msgpack_save, "CHUNK", chunk)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    tensors = arrays(dtype)
    (path,) = save_msgpack(tmp_path, tensors)
    tree = serialization.msgpack_restore(path.read_bytes())
    found = {name: bits(value) for name, value in flatten_dict(tree, sep="/").items()}
    assert found == {name: bits(value) for name, value in tensors.items()}
    path.write_bytes(serialization.msgpack_serialize(tree))
    hub = {
        "wte.weight": tensors["wte/embedding"],
        "h.0.fc.weight": tensors["h/0/fc/kernel"].T,
        "h.0.fc.bias": tensors["h/0/fc/bias"],
        "ln.weight": tensors["ln/weight"],
    }
    assert opened(tmp_path) == {name: bits(value) for name, value in hub.items()}


@pytest.mark.parametrize("name", FLAX)
def test_files_of_transformers_4(name: str) -> None:
    tree = serialization.msgpack_restore((FOLDER / name / "flax_model.msgpack").read_bytes())
    flat: dict[str, Any] = flatten_dict(tree, sep=".")
    store = open_store(find_weights(FOLDER / name), "np")
    assert len(store) == len(flat)
    for path, value in flat.items():
        stem, _, leaf = path.rpartition(".")
        hub = f"{stem}.bias" if leaf == "bias" else f"{stem}.weight"
        assert bits(store.tensor(hub)) == bits(value.T if leaf == "kernel" else value)
