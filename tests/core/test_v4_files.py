"""Checkpoints of transformers 4's Flax and TensorFlow classes, read and written with NumPy: names, layouts, values,
invalid files."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from v4_checkpoints import FLAX, FOLDER, NAMES, class_name

from monoblock import families, tree
from monoblock.auto import AutoConfig
from monoblock.checkpoint import mapped, msgpack_save
from monoblock.checkpoint.array_adapters import DTYPE_NAMES, numpy_dtype
from monoblock.checkpoint.hub import WeightFiles, find_weights
from monoblock.checkpoint.msgpack import read_msgpack
from monoblock.checkpoint.msgpack_save import save_msgpack
from monoblock.checkpoint.naming import flax_name, tensorflow_name
from monoblock.checkpoint.save import LazyTensor, save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.errors import CheckpointError

RNG = np.random.default_rng(0)
BARE = ("GPTNeoModel", "MistralModel", "MPNetModel", "OpenAIGPTModel")


def random(shape: tuple[int, ...], dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    raw = RNG.integers(0, 2 if dtype.kind == "b" else 256, (*shape, dtype.itemsize), np.uint8)
    return raw.view(dtype).reshape(shape)


def bits(array: Any) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def opened(path: Path) -> Any:
    """The store of a folder, or of one file."""
    if path.is_dir():
        return open_store(find_weights(path), "np")
    kinds: Any = {".msgpack": "msgpack", ".h5": "h5", ".safetensors": "safetensors"}
    return open_store(WeightFiles(kind=kinds[path.suffix], paths=(path,)), "np")


def contents(store: Any) -> dict[str, Any]:
    return {name: bits(store.tensor(name)) for name in store}


def refusal(path: Path, *words: str) -> str:
    """The one-line message of the error of opening or reading a file, which contains the file name and `words`."""
    with pytest.raises(CheckpointError) as caught:
        contents(opened(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message
    return message


def needs_h5py() -> Any:
    return pytest.importorskip(
        "h5py", reason="h5py is not installed: .h5 files can be neither read nor written"
    )


# --- a msgpack encoder with the shortest encodings --------------------------------------------------------------


def text(value: str) -> bytes:
    return bytes([0xA0 + len(value)]) + value.encode()


def number(value: int) -> bytes:
    return bytes([value]) if value < 128 else b"\xcd" + struct.pack(">H", value)


def array(value: Any, name: str | None = None, kind: int = 1) -> bytes:
    """An array in Flax's msgpack encoding; `name` overrides the dtype name."""
    shape = bytes([0x90 + value.ndim]) + b"".join(map(number, value.shape))
    raw = value.tobytes()
    body = b"\x93" + shape + text(name or value.dtype.name) + b"\xc4" + bytes([len(raw)]) + raw
    return b"\xc7" + bytes([len(body), kind]) + body


def table(**items: bytes) -> bytes:
    return bytes([0x80 + len(items)]) + b"".join(text(key) + value for key, value in items.items())


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "flax_model.msgpack"
    path.write_bytes(raw)
    return path


SMALL = np.arange(6, dtype=np.float32).reshape(2, 3)


# --- the recorded files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_recorded_files(name: str) -> None:
    if name not in FLAX:
        needs_h5py()
    store = opened(FOLDER / name)
    config = AutoConfig.from_pretrained(FOLDER / name)
    family = families.family(config.model_type)
    head = family.model_class(class_name(name)).head
    spec, heads = config.to_spec(), config.to_head(head) if head else None
    shapes, keymap = tree.parameters(spec, heads), family.keymap(config, head)
    plan = keymap.match(shapes, store, tree.tied(spec, heads))
    assert (plan.missing, plan.unknown) == ([], [])
    # Only MPNet's classes store a pooler that their head does not use.
    assert {key.rpartition(".")[0] for key in plan.unread} <= {"mpnet.pooler.dense"}
    for canonical, source in plan.sources.items():
        views = source.op.views(np.empty(shapes[canonical]))
        assert [view.shape for view in views] == [store.shape(key) for key in source.names]
    for key in store:
        tensor = store.tensor(key)
        assert (tensor.shape, tensor.dtype, store.dtype(key)) == (store.shape(key), np.float32, "F32")
        assert store.path(key).parent == FOLDER / name


def leaves(name: str) -> dict[str, Any]:
    """The arrays of a recorded Flax file by path."""
    store, found = opened(FOLDER / name), {}
    for path in read_msgpack(FOLDER / name / "flax_model.msgpack").entries:
        hub, transposed = flax_name(path)
        array = store.tensor(hub)
        found[path.replace(".", "/")] = array.T if transposed else array
    return found


@pytest.mark.parametrize("name", FLAX)
def test_recorded_flax_files_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    store = opened(FOLDER / name)
    (path,) = save_msgpack(tmp_path, leaves(name))
    assert path == tmp_path / "flax_model.msgpack"
    old, new = (read_msgpack(p) for p in (FOLDER / name / path.name, path))
    assert {k: e.shape for k, e in old.entries.items()} == {k: e.shape for k, e in new.entries.items()}
    assert contents(opened(path)) == contents(store)


def test_transposed_matrices_are_views_of_the_file() -> None:
    store = opened(FOLDER / "FlaxMistralModel")
    weight = store.tensor("layers.0.mlp.down_proj.weight")
    assert weight.shape == (32, 56)
    assert weight.base is not None
    assert weight.T.flags.c_contiguous
    weight[:] = 0
    assert store.tensor("layers.0.mlp.down_proj.weight").any()  # the file is unchanged


@pytest.mark.parametrize(
    ("name", "hub", "transposed"),
    [
        ("tf_open_aigpt_model/transformer/h_._0/ln_1/gamma:0", "transformer.h.0.ln_1.weight", False),
        ("tf_open_ai_gptlm_head_model/transformer/h_._11/mlp/c_fc/bias:0", "transformer.h.11.mlp.c_fc.bias", False),
        ("transformer/h_._0/attn/c_attn/weight:0", "transformer.h.0.attn.c_attn.weight", False),
        ("tfmp_net_model_1/mpnet/encoder/layer_._2/attn/q/kernel:0", "mpnet.encoder.layer.2.attn.q.weight", True),
        ("model/layers.3/input_layernorm/weight:0", "model.layers.3.input_layernorm.weight", False),
        ("mpnet/embeddings/LayerNorm/beta:0", "mpnet.embeddings.LayerNorm.bias", False),
        ("model/embed_tokens/embeddings", "model.embed_tokens.weight", False),
    ],
)  # fmt: skip
def test_tensorflow_names(name: str, hub: str, transposed: bool) -> None:
    assert tensorflow_name(name) == (hub, transposed)


@pytest.mark.parametrize(
    ("path", "hub", "transposed"),
    [
        ("transformer/wte/embedding", "transformer.wte.weight", False),
        ("transformer/h/0/ln_1/scale", "transformer.h.0.ln_1.weight", False),
        ("transformer/h/0/ln_1/bias", "transformer.h.0.ln_1.bias", False),
        ("model/norm/weight", "model.norm.weight", False),
        ("lm_head/kernel", "lm_head.weight", True),
    ],
)
def test_flax_names(path: str, hub: str, transposed: bool) -> None:
    assert flax_name(path) == flax_name(path.replace("/", ".")) == (hub, transposed)


# --- msgpack: reading and writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_every_dtype_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    value = random((3, 5), numpy_dtype(name))
    (path,) = save_msgpack(tmp_path, {"a/embedding": value, "a/bias": value[0]})
    store = opened(path)
    assert store.dtype("a.weight") == name
    assert contents(store) == {"a.weight": bits(value), "a.bias": bits(value[0])}


def test_bfloat16(tmp_path: Path) -> None:
    """Its bytes are the upper halves of float32."""
    raw = (SMALL.view(np.uint32) >> 16).astype(np.uint16)
    store = opened(written(tmp_path, table(a=table(kernel=array(raw, "bfloat16")))))
    weight = store.tensor("a.weight")
    assert (store.dtype("a.weight"), weight.dtype, weight.shape) == ("BF16", numpy_dtype("BF16"), (3, 2))
    assert np.array_equal(weight.view(np.uint16).astype(np.uint32) << 16, SMALL.T.view(np.uint32))


def test_all_encodings_of_sizes_and_a_scalar(tmp_path: Path) -> None:
    """Encodings that the recorded files do not have."""
    body = array(SMALL)[2:]
    wide = {
        "a": b"\xc8" + struct.pack(">H", len(body) - 1) + body,
        "b": b"\xc9" + struct.pack(">I", len(body) - 1) + body,
        "c": array(np.float32(7).reshape(()), kind=3),
    }
    items = b"".join(b"\xd9\x01" + key.encode() + value for key, value in wide.items())
    for head in (b"\x83", b"\xde\x00\x03", b"\xdf\x00\x00\x00\x03"):
        store = opened(written(tmp_path, head + items))
        assert {name: store.tensor(name).tolist() for name in store} == {
            "a": SMALL.tolist(),
            "b": SMALL.tolist(),
            "c": 7,
        }


def chunked(arrays: list[Any], shape: tuple[int, ...]) -> bytes:
    """A large array in Flax's chunked encoding."""
    chunks = {str(i): array(chunk) for i, chunk in enumerate(arrays)}
    sizes = {str(i): number(n) for i, n in enumerate(shape)}
    mark = b"\xb9__msgpack_chunked_array__\xc3"
    return b"\x83" + mark + text("shape") + table(**sizes) + text("chunks") + table(**chunks)


@pytest.mark.parametrize("slab", [2**26, 7])
def test_chunked_arrays_are_read(slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_SLAB", slab)
    flat = np.arange(15, dtype=np.float32)
    raw = chunked([flat[:4], flat[4:8], flat[8:]], (5, 3))
    store = opened(written(tmp_path, table(wte=table(embedding=raw), head=table(kernel=raw))))
    assert store.shape("head.weight") == (3, 5)
    assert np.array_equal(store.tensor("wte.weight"), flat.reshape(5, 3))
    assert np.array_equal(store.tensor("head.weight"), flat.reshape(5, 3).T)


def test_large_arrays_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack_save, "CHUNK", 100)
    value = random((7, 11), "float32")  # 308 bytes: four chunks, the last of 8 bytes
    (path,) = save_msgpack(tmp_path, {"a/kernel": value.T, "b": value[:2]})
    entries = read_msgpack(path).entries
    assert [len(entries[name].rest) for name in ("a.kernel", "b")] == [3, 0]
    assert contents(opened(path)) == {"a.weight": bits(value), "b": bits(value[:2])}


def test_opening_a_large_file_does_not_read_its_arrays(tmp_path: Path) -> None:
    """Three arrays of 3 GiB in a sparse file."""
    size = 3 * 2**30
    inner = (
        b"\x93\x91\xce" + struct.pack(">I", size // 4) + text("float32") + b"\xc6" + struct.pack(">I", size)
    )
    path = tmp_path / "flax_model.msgpack"
    with path.open("wb") as file:
        file.write(b"\x83")
        for name in "abc":
            file.write(text(name) + b"\xc9" + struct.pack(">I", len(inner) + size) + b"\x01" + inner)
            file.seek(size, 1)
        file.truncate()
    store = opened(path)
    assert {name: store.shape(name) for name in store} == dict.fromkeys("abc", (size // 4,))


def test_shards_and_their_index(tmp_path: Path) -> None:
    store = opened(FOLDER / "FlaxGPTNeoForCausalLM")
    tensors = leaves("FlaxGPTNeoForCausalLM")
    files = save_msgpack(tmp_path, tensors, max_shard_size="50kB", extra_files={"config.json": "{}"})
    names = [f"flax_model-0000{i}-of-00003.msgpack" for i in (1, 2, 3)]
    assert [path.name for path in files] == [*names, "flax_model.msgpack.index.json"]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["metadata"]["fingerprints"].keys() == set(names)
    assert index["weight_map"]["transformer/wte/embedding"] in names  # paths as in transformers 4
    assert contents(opened(tmp_path)) == contents(store)
    save_msgpack(tmp_path, tensors)  # one file, which replaces the shards
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "flax_model.msgpack"}


def test_a_file_with_precedence_over_the_saved_one_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_msgpack(tmp_path, {"a": SMALL})
    assert not caplog.records
    save_tensors(tmp_path, {"a": SMALL + 1}, framework="np")
    save_msgpack(tmp_path, {"a": SMALL})
    assert "model.safetensors, which is read in preference to flax_model.msgpack" in caplog.text
    assert find_weights(tmp_path).kind == "safetensors"
    assert find_weights(tmp_path, prefer="msgpack").kind == "msgpack"


def test_lazy_arrays_are_evaluated_during_the_save(tmp_path: Path) -> None:
    value = random((4, 3), "float32")
    made = LazyTensor(dtype="F32", shape=(4, 3), make=lambda: value)
    (path,) = save_msgpack(tmp_path, {"a/weight": made, "b/weight": lambda: value})
    assert contents(opened(path)) == {"a.weight": bits(value), "b.weight": bits(value)}
    wrong = LazyTensor(dtype="F32", shape=(4, 4), make=lambda: value)
    with pytest.raises(CheckpointError, match="has not the size"):
        save_msgpack(tmp_path, {"a/weight": wrong})
    assert contents(opened(path)) == {
        "a.weight": bits(value),
        "b.weight": bits(value),
    }  # the old file is unchanged
    assert [p.name for p in tmp_path.iterdir()] == ["flax_model.msgpack"]


# --- msgpack: invalid files --------------------------------------------------------------------------------------

LEAF = array(SMALL)
BROKEN = {
    "an empty file": (b"", "is empty"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "text": (b"hello", "fetch it again"),
    "a pickle": (b"\x80\x04\x95\x00", "fetch it again"),
    "a list": (b"\x91" + LEAF, "list"),
    "a number": (table(a=b"\x07"), "'a' is no array, but of type int"),
    "bytes": (table(a=b"\xc4\x01x"), "'a' is no array"),
    "no arrays": (table(a=table()), "no arrays"),
    "a foreign extension": (table(a=b"\xd4\x09x"), "'a' is no array"),
    "a complex number": (table(a=b"\xc7\x01\x02\x00"), "'a' is no array"),
    "an array of objects": (table(a=array(SMALL, "object")), "'object'"),
    "a wrong shape": (table(a=array(SMALL[:1]).replace(b"\x92\x01", b"\x92\x09")), "12 bytes"),
    "a key that is a number": (b"\x81\x01" + LEAF, "non-string key 1"),
    "a key that occurs twice": (b"\x82" + (text("a") + LEAF) * 2, "duplicate or non-string key 'a'"),
    "a name that occurs twice": (
        b"\x82" + text("a.b") + LEAF + text("a") + table(b=LEAF),
        "'a.b' occurs twice",
    ),
    "two names for one tensor": (table(a=table(kernel=LEAF, scale=LEAF)), "the same parameter"),
    "more than a tree": (table(a=LEAF) + b"\x00", "1 bytes follow"),
    "a byte that begins nothing": (b"\xc1", "is no msgpack tag"),
    "a deep tree": (b"\x81\xa1a" * 2000 + LEAF, "levels deep"),
    "a gap in the chunks": (table(a=chunked([SMALL[0]], (2, 3))), "do not fill"),
    "chunks of two dtypes": (table(a=chunked([SMALL[0], SMALL[1].astype("f8")], (2, 3))), "no array"),
    "no chunks": (table(a=b"\x81\xb9__msgpack_chunked_array__\xc3"), "no array"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_invalid_msgpack(case: str, tmp_path: Path) -> None:
    raw, word = BROKEN[case]
    refusal(written(tmp_path, raw), word)


def test_truncated_msgpack_files_of_any_length(tmp_path: Path) -> None:
    raw = table(a=table(kernel=LEAF), b=chunked([SMALL[0], SMALL[1]], (2, 3)))
    for length in range(len(raw)):
        refusal(written(tmp_path, raw[:length]))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_corrupt_msgpack_is_an_error_or_changes_values(data: st.DataObject, tmp_path_factory: Any) -> None:
    """No other exception is raised, and no bytes outside the file are read."""
    raw = bytearray(table(a=table(kernel=LEAF), b=chunked([SMALL[0], SMALL[1]], (2, 3))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = written(tmp_path_factory.getbasetemp(), bytes(raw))
    try:
        store = opened(path)
    except CheckpointError as error:
        assert path.name in str(error)
    else:
        assert all(store.tensor(name).shape == store.shape(name) for name in store)


# --- safetensors of the same classes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_", "own"),
    [("flax", "transformer.h.0.mlp.c_fc.kernel"), ("tf", "transformer/h_._0/mlp/c_fc/kernel:0")],
)
def test_safetensors_with_names_of_flax_or_tensorflow(format_: str, own: str, tmp_path: Path) -> None:
    """Those classes also saved model.safetensors, with their own names and layouts."""
    save_file({own: SMALL}, tmp_path / "model.safetensors", metadata={"format": format_})
    hub = "transformer.h.0.mlp.c_fc.weight"
    assert contents(opened(tmp_path)) == {hub: bits(SMALL.T)}
    index = {"weight_map": {own: "model.safetensors"}}
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index["weight_map"][own] = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert contents(opened(tmp_path)) == {hub: bits(SMALL.T)}


# --- HDF5 --------------------------------------------------------------------------------------------------------


def test_hdf5_shards(tmp_path: Path) -> None:
    """In transformers 4's format: datasets at the top level without the model's name, which the index has."""
    h5py = needs_h5py()
    whole = opened(FOLDER / "TFMPNetForMaskedLM")
    weight_map: dict[str, str] = {}
    written_names: set[str] = set()
    with h5py.File(FOLDER / "TFMPNetForMaskedLM" / "tf_model.h5") as source:
        names = [
            (group, name) for group in ("mpnet", "lm_head") for name in source[group].attrs["weight_names"]
        ]
        for i, (group, name) in enumerate(names):
            short = name.partition("/")[2]
            if short in written_names:
                continue
            written_names.add(short)
            shard = f"tf_model-0000{1 + i % 2}-of-00002.h5"
            with h5py.File(tmp_path / shard, "a") as target:
                target.create_dataset(short, data=source[group][name][()])
            weight_map[name] = shard
    (tmp_path / "tf_model.h5.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = find_weights(tmp_path)
    assert (files.kind, len(files.paths)) == ("h5", 2)
    assert contents(opened(tmp_path)) == contents(whole)


def write_h5(folder: Path, **datasets: Any) -> Path:
    h5py = needs_h5py()
    path = folder / "tf_model.h5"
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def test_hdf5_named_types_are_ignored(tmp_path: Path) -> None:
    h5py = needs_h5py()
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file["a/kernel:0"] = SMALL
        file["a/kind"] = np.dtype("<f4")
    assert list(contents(opened(tmp_path))) == ["a.weight"]


def test_hdf5_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = write_h5(tmp_path, a_kernel=SMALL)
    data = path.read_bytes()
    assert data.count(b"a_kernel") == 1
    path.write_bytes(data.replace(b"a_kernel", b"a\x80kernel"))
    with pytest.raises(CheckpointError, match="is damaged"):
        opened(tmp_path)


def test_hdf5_layouts(tmp_path: Path) -> None:
    """Big-endian, compressed, half precision, and a bias of shape (1, n)."""
    h5py = needs_h5py()
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a/kernel:0", data=SMALL.astype(">f4"))
        file.create_dataset("b/kernel:0", data=SMALL, compression="gzip", chunks=(1, 3))
        file.create_dataset("c/gamma:0", data=SMALL[0].astype("f2"))
        file.create_dataset("c/bias:0", data=SMALL[:1])
    store = opened(path)
    assert {name: store.dtype(name) for name in store} == {
        "a.weight": "F32",
        "b.weight": "F32",
        "c.weight": "F16",
        "c.bias": "F32",
    }
    assert np.array_equal(store.tensor("a.weight"), SMALL.T)
    assert np.array_equal(store.tensor("b.weight"), SMALL.T)
    assert np.array_equal(store.tensor("c.bias"), SMALL[0])
    assert store.shape("c.bias") == (3,)


def test_hdf5_references_to_other_files_are_not_followed(tmp_path: Path) -> None:
    h5py = needs_h5py()
    (tmp_path / "secret").write_bytes(b"0" * 64)
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])
    refusal(path, "'a'", "other files")
    write_h5(tmp_path, b=SMALL).rename(tmp_path / "other.h5")
    with h5py.File(path, "w") as file:
        file["a"] = SMALL
        file["linked"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "b")
    assert list(opened(path)) == ["a"]


@pytest.mark.parametrize(
    ("raw", "word"), [(b"", "is empty"), (b"hello", "cannot be read as HDF5"), (b"<html>", "web page")]
)
def test_files_that_are_not_hdf5(raw: bytes, word: str, tmp_path: Path) -> None:
    needs_h5py()
    path = tmp_path / "tf_model.h5"
    path.write_bytes(raw)
    refusal(path, word)


def test_hdf5_without_weights_or_with_strings(tmp_path: Path) -> None:
    refusal(write_h5(tmp_path), "without weights")
    refusal(write_h5(tmp_path, a=["text"]), "'a'", "dtype")


def test_truncated_hdf5_files(tmp_path: Path) -> None:
    needs_h5py()
    raw = (FOLDER / "TFMPNetModel" / "tf_model.h5").read_bytes()
    path = tmp_path / "tf_model.h5"
    for length in range(1, len(raw), len(raw) // 40):
        path.write_bytes(raw[:length])
        refusal(path)


def test_missing_h5py_raises_an_import_error_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        opened(FOLDER / "TFMPNetModel")
