"""bench/gpu.py runs, on tiny models on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_check(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--check", "--quantize", "int8"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert "a check, no measurement" in lines[0]
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in rows[2:]] == [
        "mistral-7b bf16",
        "mistral-7b int8",
        "mpt-7b bf16",
        "mpt-7b int8",
    ]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert torch.get_default_dtype() == torch.float32


def test_bytes_of_a_token(gpu: Any) -> None:
    """A tied embedding is read whole, as the head; of an untied one, a row is not counted."""
    for name in gpu.MODELS:
        model = gpu.random_model(name, gpu.CHECK)
        assert model.dtype == torch.bfloat16
        embed = model.get_input_embeddings().weight.numel()
        numbers = model.num_parameters() - (0 if model.tied() else embed)
        assert gpu.bytes_read(model) == 2 * numbers


def test_without_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU, and there is none"):
        gpu.main()
