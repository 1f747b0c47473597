"""Reading and writing safetensors with NumPy: bytes, layout, invalid files, interrupted saves."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from monoblock.checkpoint import save as save_module
from monoblock.checkpoint.array_adapters import numpy_dtype
from monoblock.checkpoint.files import read_json, write_atomically
from monoblock.checkpoint.hub import WeightFiles, find_weights
from monoblock.checkpoint.store import open_store, parse_size, save_tensors
from monoblock.errors import CheckpointError

RNG = np.random.default_rng(0)
PLAIN = ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "complex64"]
PLAIN += ["float64", "int64", "uint64"]
EXTENSION = ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]  # not in NumPy


def random(shape, dtype):
    dtype = np.dtype(dtype)
    raw = RNG.integers(0, 2 if dtype.kind == "b" else 256, (*shape, dtype.itemsize), np.uint8)
    return raw.view(dtype).reshape(shape)


def one(path):
    return WeightFiles(kind="safetensors", paths=(Path(path),))


def opened(folder):
    return open_store(find_weights(folder), "np")


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def refusal(call, *words, error=CheckpointError):
    """The one-line message of the error that `call` raises, which contains all of `words`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- writing and reading ---------------------------------------------------------------------------------


@pytest.fixture
def tensors():
    named = {dtype: random((3, 5), dtype) for dtype in PLAIN}
    named |= {name: random((4, 2), numpy_dtype(name)) for name in EXTENSION}
    return named | {
        "scalar": random((), "float32"),
        "none": random((0, 7), "float32"),
        "é": random((2,), "float16"),
    }


def test_every_dtype_survives_a_round_trip(tmp_path, tensors):
    save_tensors(tmp_path, tensors, framework="np")
    store = opened(tmp_path)
    assert set(store.keys()) == set(store) == set(tensors)
    assert len(store) == len(tensors)
    for name, tensor in tensors.items():
        assert bits(store.tensor(name)) == bits(tensor)
        assert store.shape(name) == tensor.shape
        assert store.path(name) == tmp_path / "model.safetensors"
    assert [store.dtype(name) for name in EXTENSION] == EXTENSION
    assert store.dtype("float32") == "F32"
    assert store.metadata == {"format": "pt"}
    assert "absent" not in store


def test_files_equal_those_of_safetensors(tmp_path, tensors):
    plain = {name: tensor for name, tensor in tensors.items() if name not in EXTENSION}
    save_tensors(tmp_path, plain, framework="np")
    save_file(plain, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()


def test_safetensors_reads_shards(tmp_path):
    tensors = {f"t{i}": random((10, 10), "float32") for i in range(7)}
    *shards, index = save_tensors(tmp_path, tensors, framework="np", max_shard_size=800)
    assert [path.name for path in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    listed = json.loads(index.read_text())
    assert index.name == "model.safetensors.index.json"
    assert listed["metadata"]["total_size"] == 7 * 400
    assert list(listed["weight_map"]) == sorted(tensors)
    for name, tensor in tensors.items():
        with safe_open(tmp_path / listed["weight_map"][name], "np") as file:
            assert bits(file.get_tensor(name)) == bits(tensor)
    store = opened(tmp_path)
    assert all(bits(store.tensor(name)) == bits(tensor) for name, tensor in tensors.items())
    assert store.path("t6") == shards[3]


def test_a_tensor_larger_than_max_shard_size_has_its_own_shard(tmp_path):
    tensors = {"a": random((4,), "uint8"), "big": random((50,), "uint8"), "b": random((4,), "uint8")}
    *shards, _ = save_tensors(tmp_path, tensors, framework="np", max_shard_size=10)
    assert [set(open_store(one(path), "np")) for path in shards] == [{"big"}, {"a", "b"}]


def test_views_and_big_endian_arrays(tmp_path):
    base = random((6, 8), "float32")
    views = {"t": base.T, "step": base[::2, 1::3], "flip": base[::-1], "big": base.astype(">f4")}
    save_tensors(tmp_path, views, framework="np")
    store = opened(tmp_path)
    for name, view in views.items():
        assert np.array_equal(store.tensor(name), view)
        assert store.tensor(name).dtype == np.dtype("<f4")


def test_tied_tensors_are_written_once(tmp_path):
    base = random((6, 8), "float32")
    tied = {"embed": base, "head": base[:], "slice": base[:3], "transposed": base.T, "copy": base.copy()}
    save_tensors(tmp_path, tied, framework="np")
    store = opened(tmp_path)
    assert set(store) == {"embed", "slice", "transposed", "copy"}
    assert store.metadata == {"format": "pt", "head": "embed"}


def test_lazy_values_are_freed_one_by_one(tmp_path):
    made = []

    def make():
        assert all(reference() is None for reference in made)
        array = np.full((100,), len(made), np.int32)
        made.append(weakref.ref(array))
        return array

    save_tensors(tmp_path, {"a": make, "b": make}, framework="np")
    assert len(made) == 4  # once for its shape, once for its bytes
    store = opened(tmp_path)
    assert [store.tensor(name)[0] for name in "ab"] == [2, 3]


def test_metadata(tmp_path):
    save_tensors(tmp_path, {"a": random((1,), "int8")}, framework="np", metadata={"format": "np", "by": "me"})
    assert opened(tmp_path).metadata == {"format": "np", "by": "me"}
    refusal(
        lambda: save_tensors(tmp_path, {"a": random((1,), "int8")}, framework="np", metadata={"n": 1}),
        "metadata['n']",
        error=TypeError,
    )


def test_tensors_are_private_mappings_of_the_file(tmp_path):
    [path] = save_tensors(
        tmp_path, {"a": random((5000,), "float32"), "b": random((5000,), "int8")}, framework="np"
    )
    before = path.read_bytes()
    store = opened(tmp_path)
    first = store.tensor("a")
    assert not first.flags.owndata
    assert first.flags.writeable
    first[:] = 1
    assert path.read_bytes() == before
    assert store.tensor("a").tobytes() == before[offset_of(path) :][:20_000]


def offset_of(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_deleting_a_tensor_does_not_change_others(tmp_path):
    """Its pages are released, but not those of adjacent tensors or of other mappings of the same tensor."""
    save_tensors(tmp_path, {n: np.zeros(5001, np.int32) for n in "abc"}, framework="np")
    store = opened(tmp_path)
    tensors = [store.tensor(name) for name in "abcbac"]
    for value, tensor in enumerate(tensors):
        assert (tensor == 0).all()
        tensor[:] = value
    del tensors[1], tensors[3], tensor
    assert [set(tensor.tolist()) for tensor in tensors] == [{0}, {2}, {3}, {5}]
    assert (store.tensor("b") == 0).all()  # the file is unchanged


def test_repeated_reads_leak_no_file_descriptors(tmp_path):
    save_tensors(tmp_path, {n: np.zeros(5001, np.int32) for n in "ab"}, framework="np")
    store = opened(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        assert not store.tensor("a").any()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_tensors_outlive_the_store_and_the_file(tmp_path):
    [path] = save_tensors(tmp_path, {"a": np.arange(9000)}, framework="np")
    tensor = opened(tmp_path).tensor("a")
    path.unlink()
    assert np.array_equal(tensor, np.arange(9000))


def test_unaligned_tensors(tmp_path):
    data = random((3,), "float32")
    (tmp_path / "old").write_bytes(raw({"a": field("F32", [3], 0, 12)}, data.tobytes(), pad=1))
    tensor = open_store(one(tmp_path / "old"), "np").tensor("a")
    assert np.array_equal(tensor, data, equal_nan=True)
    assert tensor.flags.aligned


def test_extension_dtypes_without_ml_dtypes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    numpy_dtype.cache_clear()
    try:
        tensor = random((4, 6), numpy_dtype("BF16"))
        moved = np.concatenate([tensor.T[:3], tensor.T[3:]]).reshape(2, 12)
        save_tensors(tmp_path, {"a": moved}, framework="np")
        assert opened(tmp_path).dtype("a") == "BF16"
        assert bits(opened(tmp_path).tensor("a")) == bits(moved)
        with pytest.raises(TypeError):
            tensor + tensor
    finally:
        numpy_dtype.cache_clear()


def test_extension_dtypes_with_ml_dtypes(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    save_tensors(tmp_path, {"a": values}, framework="np")
    assert bits(opened(tmp_path).tensor("a")) == bits(values)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("1GiB", 2**30),
        ("1.5 kib", 1536),
        (" 10b ", 10),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("size", ["", "GB", "5", "5XB", "-5GB", "5GB5", 0, -1, "0GB", True, 1.5, None])
def test_invalid_sizes(size):
    refusal(lambda: parse_size(size), "max_shard_size", repr(size), error=ValueError)


# --- invalid files ---------------------------------------------------------------------------------------


def field(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(header, data=b"", pad=0):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8 + pad)
    return len(text).to_bytes(8, "little") + text + data


GOOD = raw({"a": field("F32", [2], 0, 8), "b": field("I8", [4], 8, 12)}, bytes(12))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
INVALID = {
    "empty": (b"", "is empty"),
    "git-lfs pointer": (LFS, "Git LFS pointer, not the weights"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "four bytes": (b"abcd", "not a safetensors file"),
    "text": (b"these are no weights at all", "not a safetensors file"),
    "pickle": (b"\x80\x02}q\x00.", "not a safetensors file"),
    "no JSON": (raw("{nope"), "not valid JSON"),
    "not UTF-8": (raw("{}").replace(b"{}", b"\xff\xfe"), "not valid JSON"),
    "deep JSON": (raw("[" * 9_000), "not valid JSON"),
    "lists": (raw("[[],[]" + ",[]" * 100_000 + "]"), "it is no table of tensors"),
    "list": (raw("[]"), "list"),
    "cut in the header": (GOOD[:20], "is truncated"),
    "cut in the data": (GOOD[:-1], f"is truncated: {len(GOOD) - 1} bytes of {len(GOOD)}"),
    "too long": (GOOD + b"x", "1 bytes after its last tensor"),
    "overlap": (raw({"a": field("F32", [2], 0, 8), "b": field("I8", [4], 6, 10)}, bytes(10)), "'b' overlaps"),
    "the same bytes": (
        raw({"a": field("I8", [4], 0, 4), "b": field("I8", [4], 0, 4)}, bytes(4)),
        "'b' overlaps",
    ),
    "hole": (
        raw({"a": field("I8", [4], 0, 4), "b": field("I8", [4], 8, 12)}, bytes(12)),
        "'b' leaves a hole",
    ),
    "out of range": (raw({"a": field("I8", [400], 0, 400)}, bytes(4)), "is truncated"),
    "size and shape": (raw({"a": field("F32", [2], 0, 4)}, bytes(4)), "'a' of F32 [2] needs 8 bytes"),
    "backwards": (raw({"a": field("I8", [4], 4, 0)}, bytes(4)), "'a' of I8 [4] needs 4 bytes"),
    "huge shape": (raw({"a": field("F32", [2**62, 2**62], 0, 8)}, bytes(8)), "'a' of F32"),
    "negative": (raw({"a": field("I8", [-4], 0, 4)}, bytes(4)), "'a' lacks a proper"),
    "true": (raw({"a": field("I8", [True], 0, 1)}, bytes(1)), "'a' lacks a proper"),
    "three offsets": (
        raw({"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1, 2]}}, bytes(1)),
        "'a' lacks",
    ),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 1]}}, bytes(1)), "'a' lacks a proper"),
    "no table": (raw({"a": 3}), "'a' lacks a proper"),
    "unknown dtype": (raw({"a": field("F13", [1], 0, 2)}, bytes(2)), "dtype 'F13', which is not supported"),
    "sub-byte dtype": (raw({"a": field("F4", [2], 0, 1)}, bytes(1)), "dtype 'F4', which is not supported"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "twice": (raw('{"a": 1, "a": 2}'), "a name occurs twice"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_files(tmp_path, case):
    data, words = INVALID[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    refusal(lambda: opened(tmp_path), str(tmp_path / "model.safetensors"), words)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_corrupt_files_are_refused_or_readable(tmp_path, offset, value, length):
    """A changed byte and a truncated file: a `CheckpointError`, or tensors within the file."""
    data = bytearray(GOOD)
    data[offset] = value
    (tmp_path / "model.safetensors").write_bytes(data[:length])
    try:
        store = opened(tmp_path)
    except CheckpointError:
        return
    assert all(store.tensor(name).shape == store.shape(name) for name in store)


def test_missing_file(tmp_path):
    refusal(lambda: open_store(one(tmp_path / "gone"), "np"), str(tmp_path / "gone"), "does not exist")


def test_a_tensor_of_the_index_missing_in_its_shard(tmp_path):
    *_, index = save_tensors(
        tmp_path, {n: random((4,), "int8") for n in "ab"}, framework="np", max_shard_size=4
    )
    listed = json.loads(index.read_text())
    listed["weight_map"]["c"] = listed["weight_map"]["b"]
    index.write_text(json.dumps(listed))
    refusal(lambda: opened(tmp_path), "model-00002-of-00002.safetensors lacks tensor 'c'")


def test_a_tensor_missing_in_the_index_is_read(tmp_path):
    *_, index = save_tensors(
        tmp_path, {n: random((4,), "int8") for n in "ab"}, framework="np", max_shard_size=4
    )
    listed = json.loads(index.read_text())
    for name in "ab":
        (tmp_path / listed["weight_map"][name]).write_bytes(
            raw({x: field("I8", [1], i, i + 1) for i, x in enumerate([name, "more"])}, bytes(2))
        )
    refusal(lambda: opened(tmp_path), "tensor 'more' is both in")
    listed["weight_map"]["more"] = listed["weight_map"]["a"]
    index.write_text(json.dumps(listed))
    store = opened(tmp_path)
    assert set(store) == {"a", "b", "more"}
    assert store.path("more").name == listed["weight_map"]["a"]


def test_unknown_framework(tmp_path):
    refusal(lambda: open_store(one(tmp_path), "tf"), "'tf'", "'np'", error=ValueError)


def test_bin_files_need_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refusal(
        lambda: opened(tmp_path), "pytorch_model.bin", 'pip install "monoblock[torch]"', error=ImportError
    )


def test_reading_and_writing_with_numpy_imports_no_framework(tmp_path):
    code = f"""
import sys, numpy
sys.modules["torch"] = None
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.store import open_store, save_tensors
save_tensors({str(tmp_path)!r}, {{"a": numpy.arange(4)}}, framework="np")
tensor = open_store(find_weights({str(tmp_path)!r}), "np").tensor("a")
print(tensor, {{"huggingface_hub", "jax", "safetensors"}} & set(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[0 1 2 3] set()", run.stderr


# --- failed saves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [np.array(["a"]), np.array([None]), np.zeros(2, "c16"), np.zeros(2, [("x", "f4")])]
)
def test_unsupported_dtypes_are_refused(tmp_path, value):
    refusal(lambda: save_tensors(tmp_path, {"bad": value}, framework="np"), "'bad'", str(value.dtype))
    assert not content(tmp_path)


def test_reserved_name(tmp_path):
    refusal(lambda: save_tensors(tmp_path, {"__metadata__": np.zeros(1)}, framework="np"), "__metadata__")


@pytest.fixture
def earlier(tmp_path):
    """A folder with a checkpoint in two shards."""
    save_tensors(tmp_path, {n: random((500,), "float32") for n in "ab"}, framework="np", max_shard_size=2000)
    assert len(content(tmp_path)) == 3
    return tmp_path


def after(calls, error):
    """A lazy value for `save_tensors` that raises `error` at its `calls`-th evaluation."""
    left = [calls]

    def make():
        left[0] -= 1
        if not left[0]:
            raise error
        return np.zeros(500, np.float32)

    return make


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("shard_size", ["1GB", 2000])
def test_interrupted_save_leaves_the_earlier_checkpoint(earlier, error, shard_size):
    before = content(earlier)
    values = {"a": np.zeros(500, np.float32), "b": after(2, error)}
    with pytest.raises(type(error)):
        save_tensors(earlier, values, framework="np", max_shard_size=shard_size)
    assert content(earlier) == before


def test_disk_full(earlier, monkeypatch):
    before = content(earlier)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    values = {"a": np.zeros(500, np.float32), "b": after(2, full)}
    refusal(lambda: save_tensors(earlier, values, framework="np"), str(earlier), "No space left", "unchanged")
    assert content(earlier) == before

    def no_sync(_):
        raise full

    monkeypatch.setattr(os, "fsync", no_sync)  # some file systems report it at fsync
    values["b"] = np.zeros(500, np.float32)
    refusal(lambda: save_tensors(earlier, values, framework="np"), str(earlier), "No space left", "unchanged")
    assert content(earlier) == before


def test_file_size_limit(earlier):
    before = content(earlier)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        refusal(
            lambda: save_tensors(earlier, {"a": np.zeros(9999)}, framework="np"),
            str(earlier),
            "File too large",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(earlier) == before


def test_killed_save(earlier):
    """After SIGKILL the earlier checkpoint is intact, and the next save removes the temporary files."""
    before = content(earlier)
    code = f"""
import os, signal, numpy
from monoblock.checkpoint.store import save_tensors
calls = []
def make():
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return numpy.zeros(3)
save_tensors({str(earlier)!r}, {{"a": numpy.zeros(100_000), "b": make}}, framework="np")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert content(earlier) == before
    assert len(list(earlier.parent.glob(".monoblock*"))) == 1
    assert set(opened(earlier)) == {"a", "b"}
    save_tensors(earlier, {"c": np.zeros(3)}, framework="np")
    assert set(content(earlier)) == {"model.safetensors"}
    assert not list(earlier.parent.glob(".monoblock*"))


def test_unwritable_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refusal(lambda folder=folder: save_tensors(folder, {"a": np.zeros(1)}, framework="np"), str(folder))
    if os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        refusal(lambda: save_tensors(tmp_path, {"a": np.zeros(1)}, framework="np"), "Permission denied")
        tmp_path.chmod(0o700)


def test_files_of_an_earlier_save_are_removed_after_success(tmp_path):
    stale = ["model-00001-of-00009.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    stale += ["model.safetensors.index.json", "pytorch_model-00001-of-00002.bin"]
    kept = [
        "config.json",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "tf_model.h5",
        "model-1.safetensors",
    ]
    for name in stale + kept:
        (tmp_path / name).write_text("{}")
    save_tensors(tmp_path, {"a": np.zeros(1)}, framework="np")
    assert set(content(tmp_path)) == {*kept, "model.safetensors"}


def test_a_stale_file_that_cannot_be_removed_is_an_error(tmp_path):
    (tmp_path / "pytorch_model.bin").mkdir()  # cannot be unlinked
    refusal(
        lambda: save_tensors(tmp_path, {"a": np.zeros(1)}, framework="np"), "pytorch_model.bin", "remove it"
    )


def test_a_checkpoint_is_saved_over_itself(tmp_path):
    tensors = {"a": random((9000,), "float32"), "b": random((9000,), "int64")}
    save_tensors(tmp_path, tensors, framework="np")
    store = opened(tmp_path)
    save_tensors(tmp_path, {n: store.tensor(n) for n in store}, framework="np", max_shard_size="40kB")
    assert all(bits(opened(tmp_path).tensor(n)) == bits(tensors[n]) for n in tensors)


def test_saving_writes_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "_CHUNK", 7)
    tensor = random((33,), "float32")
    save_tensors(tmp_path, {"a": tensor}, framework="np")
    assert bits(opened(tmp_path).tensor("a")) == bits(tensor)


# --- JSON and other small files --------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"nul", b"3"])
def test_broken_json(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    refusal(lambda: read_json(tmp_path / "config.json"), str(tmp_path / "config.json"), "JSON")


def test_json(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"a": "é"}
    refusal(lambda: read_json(tmp_path / "none.json"), "none.json", "No such file")


def test_small_files_are_written_atomically(tmp_path):
    path = write_atomically(tmp_path / "new" / "config.json", lambda p: p.write_text("1"))
    assert path.read_text() == "1"
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda p: (p.write_text("2"), 1 / 0))
    assert content(path.parent) == {"config.json": b"1"}
