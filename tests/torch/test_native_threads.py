"""The threads of the native kernels: a pool of their own without OpenMP, and PyTorch's with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model

from monoblock import native
from monoblock.backends.pytorch.generation import native_decoder
from monoblock.backends.pytorch.kernels import linear, native_ops
from monoblock.backends.pytorch.quantization import formats
from monoblock.native import abi, build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler is installed")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str | None, str]:
    """The lowest level of the real sources, built without OpenMP; as `native.choose` gives it."""
    folder: Path = tmp_path_factory.mktemp("pool")
    path_of, levels = build.path_of, build.levels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "levels", lambda *_: {"base": ()})
        patch.setattr(build, "FLAGS", [flag.replace("-O3", "-O1") for flag in build.FLAGS])  # a quicker build
        patch.setattr(build, "path_of", lambda level, folder=folder: path_of(level, folder))
        assert build.build(folder, openmp=False).levels == ("base",)
        patch.setattr(build, "levels", levels)
        return native.choose("base")


@pytest.fixture
def pool(pooled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That build in use."""
    monkeypatch.setattr(native, "_opened", lambda: pooled)
    monkeypatch.setattr(native_ops, "LIBRARY", pooled[0])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_status(pooled: Any) -> None:
    library, level, status = pooled
    assert level == "base" and not native.has_openmp(library)
    assert status == "base; built without OpenMP: on threads of its own"


def results() -> list[torch.Tensor]:
    """Of every kind of parallel loop: products with few and many rows, the decode step, attention, norms, 12 bits."""
    seeded = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 256, generator=seeded), torch.randn(300, 256, generator=seeded)
    module = model("MptForCausalLM")
    ids = torch.arange(40)[None] % 7
    found = [linear.dense(x[:5], weight, None), linear.quantized_dense(x, formats.pack(weight, 8, 64), None)]
    found.append(linear.quantized_dense(x[:3], formats.pack(weight, 4, 128), None))
    found.append(linear._bfloat16(native.library(), formats.pack(weight.bfloat16(), 12, 128)))
    found += [module(ids).logits, module.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)]
    return found


@torch.no_grad()
@pytest.mark.usefixtures("pool")
def test_threads_do_not_change_the_results() -> None:
    torch.set_num_threads(1)
    expected = results()
    assert native_decoder.obstacle(model("MptForCausalLM")) is None
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)), threads


@torch.no_grad()
@pytest.mark.usefixtures("pool")
def test_calls_from_several_threads() -> None:
    """One of them has the pool; the others run alone meanwhile."""
    torch.set_num_threads(3)
    x, weight = torch.randn(4, 1024), torch.randn(2000, 1024)
    expected = linear.dense(x, weight, None)
    with ThreadPoolExecutor(4) as callers:
        for found in callers.map(lambda _: linear.dense(x, weight, None), range(40)):
            assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.usefixtures("pool")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_has_a_pool_of_its_own(pooled: Any) -> None:
    """The workers of the parent's pool do not exist in a child."""
    library = pooled[0]
    x, weight, y = (
        np.ones((2, 512), np.float32),
        np.ones((1000, 512), np.float32),
        np.zeros((2, 1000), np.float32),
    )
    matrix = abi.Matrix(weight.ctypes.data, None, None, None, 1000, 512, native.FORMATS["float32"], 0, 0, 0)

    def product() -> bool:
        y[:] = 0
        status = library.mb_linear(matrix, x.ctypes.data, 0, 512, 2, y.ctypes.data, 0, 1000, 4)
        return status == 0 and bool((y == 512).all())

    assert product()
    child = os.fork()
    if not child:
        os._exit(0 if product() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert product()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("pool")
def test_the_pool_has_the_threads_that_are_asked_for() -> None:
    """More than the tests before have used; those of the first call serve the second."""
    counts = []
    for threads in (8, 8, 11):
        torch.set_num_threads(threads)
        linear.dense(torch.randn(4, 1024), torch.randn(2000, 1024), None)
        counts.append(sum(1 for _ in Path("/proc/self/task").iterdir()))
    assert counts[1] == counts[0] and counts[2] == counts[1] + 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["native", "torch"])
def test_kernels_and_pytorch_share_one_openmp_runtime(first: str) -> None:
    """Two runtimes would be two pools of threads on the same cores, whichever of the two is opened first."""
    opened = {"native": "from monoblock import native; native.library()", "torch": "import torch"}
    second = opened["torch" if first == "native" else "native"]
    maps = "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
    code = f"{opened[first]}; {second}; {maps}"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(found) <= 1
    assert not found or Path(found[0]).parent == Path(torch.__file__).parent / "lib"
