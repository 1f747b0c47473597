"""Tests with peft, trl, accelerate and other packages, in their own environment: `make test-ecosystem`. Each test runs
with transformers as the reference, and with monoblock."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

ON = os.environ.get("MONOBLOCK_TEST_ECOSYSTEM") == "1"
collect_ignore_glob = [] if ON else ["test_*"]

if ON:
    # Read by the packages at import: no network, no GPU, one thread per process, temporary caches.
    _home = tempfile.TemporaryDirectory(prefix="monoblock-ecosystem-")
    os.environ |= {
        "HF_HOME": _home.name,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(_home.name, "inductor"),  # noqa: PTH118
    }

_found: dict[str, Any] = {}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny checkpoints written by transformers, each created once."""
    from tiny import Folders

    return Folders(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(params=["transformers", "monoblock"])
def library(request: pytest.FixtureRequest, folders: Any) -> Any:
    """transformers (the reference) or monoblock."""
    from tiny import Library

    return Library(request.param, folders)


@pytest.fixture
def transformers_library(folders: Any) -> Any:
    from tiny import Library

    return Library("transformers", folders)


@pytest.fixture
def monoblock_library(folders: Any) -> Any:
    from tiny import Library

    return Library("monoblock", folders)


@pytest.fixture
def agree(library: Any, transformers_library: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """agree(run, atol) returns run(library), which must equal run(transformers) within `atol`."""
    from transformers import set_seed

    def seeded(run: Callable[[Any], Any], which: Any) -> Any:
        set_seed(0)
        return run(which)

    def check(run: Callable[[Any], Any], atol: float = 1e-5) -> Any:
        key = request.node.nodeid.replace("monoblock", "transformers") + run.__qualname__
        value = seeded(run, library)
        if library.name == "transformers":
            _found[key] = value
            return value
        if key not in _found:
            _found[key] = seeded(run, transformers_library)
        equal(value, _found[key], atol)
        return value

    return check


def equal(value: Any, expected: Any, atol: float, where: str = "") -> None:
    """Nested values are equal, floats within `atol`."""
    import numpy
    import torch

    if isinstance(expected, numpy.floating):
        value, expected = float(value), float(expected)
    if isinstance(expected, dict):
        assert list(value) == list(expected), where
        for key in expected:
            equal(value[key], expected[key], atol, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected), (where, value, expected)
        for i, (one, other) in enumerate(zip(value, expected, strict=True)):
            equal(one, other, atol, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor | float):
        torch.testing.assert_close(value, expected, atol=atol, rtol=1e-5, msg=lambda text: f"{where}: {text}")
    else:
        assert value == expected, where
