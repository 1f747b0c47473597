"""Kernels built without OpenMP: PyTorch's kernels are preferred where PyTorch has several threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import model

from monoblock import native
from monoblock.backends.pytorch.generation import native_decoder
from monoblock.backends.pytorch.kernels import linear, native_ops
from monoblock.backends.pytorch.quantization import formats
from monoblock.native import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler is installed")


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str | None, str]:
    """The lowest level of the real sources, built without OpenMP; as `native.choose` gives it."""
    folder: Path = tmp_path_factory.mktemp("serial")
    path_of = build.path_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "levels", lambda *_: {"base": ()})
        patch.setattr(build, "FLAGS", [flag.replace("-O3", "-O1") for flag in build.FLAGS])  # a quicker build
        patch.setattr(build, "_openmp", lambda *_: ())
        patch.setattr(build, "path_of", lambda level, folder=folder: path_of(level, folder))
        assert build.build(folder).levels == ("base",)
        return native.choose("base")


@pytest.fixture
def called(serial: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """That build in use; the names of its functions that were called."""
    names: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            names.append(name)
            return getattr(serial[0], name)

    watched = (Watched(), *serial[1:])
    monkeypatch.setattr(native, "_opened", lambda: watched)
    monkeypatch.setattr(native_ops, "LIBRARY", watched[0])
    before = torch.get_num_threads()
    yield names
    torch.set_num_threads(before)


def test_status(serial: Any) -> None:
    library, level, status = serial
    assert level == "base" and not native.has_openmp(library)
    assert status == "base; built without OpenMP: single-threaded"


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
def test_native_kernels_only_with_one_thread(threads: int, called: list[str]) -> None:
    torch.set_num_threads(threads)
    x, weight = torch.randn(1, 8, 128), torch.randn(16, 128)
    module = model("MptForCausalLM")
    linear.dense(x[:, :1], weight, None)
    assert ("mb_linear" in called) == (threads == 1)
    assert native_ops.usable(x) == (threads == 1)
    reason = native_decoder.obstacle(module)
    if threads == 1:
        assert reason is None
    else:
        assert reason is not None and "PyTorch has 2 threads and the native kernels one" in reason
    called.clear()
    module(torch.arange(9)[None])
    assert bool(called) == (threads == 1)


@torch.inference_mode()
def test_quantised_products_stay_native(called: list[str]) -> None:
    """PyTorch would unpack the weights first."""
    torch.set_num_threads(2)
    weight = torch.randn(16, 128)
    made = formats.pack(weight, 8, 64)
    y = linear.quantized_dense(torch.randn(1, 128), made, None)
    assert y.shape == (1, 16) and "mb_linear" in called


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
