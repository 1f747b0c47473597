"""Checkpoint files with PyTorch: dtypes, memory, ties, .bin files of every torch version, and pickles with code."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from monoblock.checkpoint.hub import WeightFiles, find_weights
from monoblock.checkpoint.store import open_store, save_tensors
from monoblock.errors import CheckpointError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
]
DTYPES += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
DTYPES += [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def random(shape, dtype):
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def opened(folder, framework="pt"):
    return open_store(find_weights(folder), framework)


def assert_raises(call, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.fixture
def tensors():
    named = {str(dtype): random((3, 4), dtype) for dtype in DTYPES}
    return named | {"scalar": torch.tensor(2.5), "none": torch.empty(0, 7, dtype=torch.bfloat16)}


# --- safetensors -----------------------------------------------------------------------------------------


def test_every_dtype_is_bitwise_equal(tmp_path, tensors):
    save_tensors(tmp_path, tensors, framework="pt")
    store = opened(tmp_path)
    assert set(store) == set(tensors)
    for name, tensor in tensors.items():
        assert bits(store.tensor(name)) == bits(tensor)
        assert store.shape(name) == tuple(tensor.shape)


def test_reference_library_reads_and_writes_the_same(tmp_path, tensors):
    [path] = save_tensors(tmp_path, tensors, framework="pt")
    known = {name: tensor for name, tensor in tensors.items() if name != "torch.float8_e8m0fnu"}
    read = load_file(path)
    assert all(bits(read[name]) == bits(tensor) for name, tensor in known.items())
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "reference").read_bytes()


def test_shards_equal_huggingface_hub(tmp_path):
    tensors = {f"layer.{i}": random((i + 1, 100), torch.float32) for i in range(9)}
    *paths, _ = save_tensors(tmp_path, tensors, framework="pt", max_shard_size="3KB")
    reference = split_torch_state_dict_into_shards(tensors, max_shard_size="3KB")
    assert {path.name for path in paths} == set(reference.filename_to_tensors)
    store = opened(tmp_path)
    assert {name: store.path(name).name for name in store} == reference.tensor_to_filename
    assert all(bits(store.tensor(name)) == bits(tensor) for name, tensor in tensors.items())


def test_tied_weights_of_a_module_are_written_once(tmp_path):
    embed, head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11, bias=False)
    head.weight = embed.weight
    [path] = save_tensors(
        tmp_path, {"embed": embed.weight, "head": head.weight, "rows": embed.weight[:4]}, framework="pt"
    )
    store = opened(tmp_path)
    assert set(store) == {"embed", "rows"}
    assert store.metadata == {"format": "pt", "head": "embed"}
    assert bits(store.tensor("rows")) == bits(embed.weight[:4])
    assert path.stat().st_size < 11 * 8 * 4 + 4 * 8 * 4 + 300  # the tensors and a header


def test_views(tmp_path):
    base = torch.arange(48.0).reshape(6, 8)
    rotated = torch.complex(base, -base)
    views = {
        "transposed": base.T,
        "step": base[::2, 1::3],
        "wide": base[:1].expand(5, 8),
        "conjugate": rotated.conj(),
        "plain": rotated,
        "negative": rotated.conj().imag,
        "permuted": base.reshape(2, 3, 8).permute(2, 0, 1),
    }
    save_tensors(tmp_path, views, framework="pt")
    store = opened(tmp_path)
    assert set(store) == set(views)
    assert all(torch.equal(store.tensor(name), view) for name, view in views.items())


def test_tensors_are_memory_mapped_privately(tmp_path):
    [path] = save_tensors(tmp_path, {"a": torch.zeros(50_000), "b": torch.zeros(5)}, framework="pt")
    before = path.read_bytes()
    parameter = torch.nn.Parameter(opened(tmp_path).tensor("a"))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in mapped]
    assert any(begin <= parameter.data_ptr() < end for begin, end in spans)
    parameter.sum().backward()
    torch.optim.SGD([parameter], lr=1.0).step()
    assert (parameter == -1).all()
    assert path.read_bytes() == before
    assert not opened(tmp_path).tensor("a").any()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3.0, "is a float, not a tensor"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128"),
    ],
)
def test_invalid_tensors_raise(tmp_path, value, words):
    assert_raises(lambda: save_tensors(tmp_path, {"bad": value}, framework="pt"), "'bad'", words)
    assert not list(tmp_path.iterdir())


def test_numpy_and_torch_exchange_every_dtype(tmp_path, tensors):
    save_tensors(tmp_path / "a", tensors, framework="pt")
    store = opened(tmp_path / "a", "np")
    arrays = {name: store.tensor(name) for name in store}
    assert all(array.tobytes() == bits(tensors[name])[2] for name, array in arrays.items())
    save_tensors(tmp_path / "b", arrays, framework="np")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


MEASURE = """
import sys
from pathlib import Path
import torch
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.store import open_store, save_tensors

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def reset():
    Path("/proc/self/clear_refs").write_text("5")

torch.set_num_threads(1)
folder, count, size = Path(sys.argv[1]), 16, 4 * 2**20  # 64 MiB in tensors of 4 MiB
warm = {"a": torch.zeros(8)}
save_tensors(folder / "warm", warm, framework="pt"); open_store(find_weights(folder / "warm"), "pt").tensor("a").sum()
model = {str(i): torch.full((size // 2,), i, dtype=torch.bfloat16) for i in range(count)}
reset(); start = peak()
save_tensors(folder, model, framework="pt")
print((peak() - start) / size)
reset(); start = peak()
save_tensors(folder, {name: (lambda t=t: t.reshape(2, -1).T) for name, t in model.items()}, framework="pt")
print((peak() - start) / size)
store = open_store(find_weights(folder), "pt")
reset(); start = peak()
for name, tensor in model.items():
    tensor.reshape(2, -1).T.copy_(store.tensor(name))
print((peak() - start) / size)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter"
)
def test_memory_beyond_the_model(tmp_path):
    """Saving allocates no tensor, saving lazy values one tensor, loading in place one tensor."""
    # Without a fixed threshold, glibc keeps up to 7 freed tensors of this size.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    plain, made, loading = map(float, run.stdout.split())
    # In tensors of 4 MiB; the model has 16. Measured 0.01, 1.04 and 1.08.
    assert plain < 0.5
    assert made < 1.5
    assert loading < 1.5


# --- .bin ------------------------------------------------------------------------------------------------


@pytest.fixture
def weights():
    shared = torch.randn(4, 3)
    return OrderedDict(
        a=shared, b=shared.T, c=torch.randn(2).bfloat16(), n=torch.tensor(7), e=torch.empty(0, 2)
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_bin(tmp_path, weights, zipped, framework):
    """In the zip format, and in the format before torch 1.6."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    store = opened(tmp_path, framework)
    assert set(store) == set(weights)
    assert [store.dtype(name) for name in "acn"] == ["F32", "BF16", "I64"]
    for name, tensor in weights.items():
        assert store.shape(name) == tuple(tensor.shape)
        read = store.tensor(name)
        raw = read.tobytes() if framework == "np" else bits(read)[2]
        assert raw == bits(tensor)[2]


def test_bin_in_shards_to_safetensors_in_the_same_folder(tmp_path, weights):
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in names.items():
        torch.save({name: weights[name]}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    store = opened(tmp_path)
    assert {name: store.path(name).name for name in store} == names
    save_tensors(tmp_path, {name: store.tensor(name) for name in store}, framework="pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(bits(opened(tmp_path).tensor(name)) == bits(weights[name]) for name in names)


def test_bin_of_a_training_checkpoint(tmp_path, weights):
    """The weights are under "state_dict"; other entries, such as epochs and optimizers, are ignored."""
    torch.save({"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "pytorch_model.bin")
    assert set(opened(tmp_path)) == set(weights)


class Code:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
def test_pickle_with_code_raises_and_is_not_executed(tmp_path, write):
    path, witness = tmp_path / "pytorch_model.bin", tmp_path / "witness"
    content = {"a": torch.zeros(2), "b": Code(f"touch {witness}")}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content["b"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "zip")
    system = f"{os.system.__module__}.system"
    assert_raises(lambda: opened(tmp_path), str(path), "is refused", "code", system, "safetensors")
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_of_another_protocol_is_not_executed(tmp_path):
    path, witness = tmp_path / "pytorch_model.bin", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Code(f"touch {witness}"), protocol=5))
    assert_raises(lambda: opened(tmp_path), str(path), "cannot be read", "Unsupported operand")
    assert not witness.exists()


def test_pickled_module_raises(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pytorch_model.bin")
    assert_raises(lambda: opened(tmp_path), "is refused", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(1), {"a": 3}, {"a": {"b": torch.zeros(1)}}, {1: torch.zeros(1)}]
)
def test_bin_without_a_dict_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert_raises(lambda: opened(tmp_path), "pytorch_model.bin", "tensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_bin(tmp_path, weights, zipped, share):
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_raises(lambda: opened(tmp_path), str(path), "fetch it again")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS pointer"),
        (b"no pickle at all", "cannot be read"),
        (np.random.default_rng(0).bytes(1000), "cannot be read"),
    ],
)
def test_bin_in_another_format(tmp_path, data, words):
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    message = assert_raises(lambda: opened(tmp_path), "pytorch_model.bin")
    assert words in message or "refused" in message


def test_missing_bin(tmp_path):
    files = WeightFiles(kind="bin", paths=(tmp_path / "gone.bin",))
    assert_raises(lambda: open_store(files, "pt"), "gone.bin", "does not exist")
