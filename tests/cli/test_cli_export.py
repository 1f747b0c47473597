"""`monoblock export`: options, refusals, and what is missing, without the packages that it needs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import embedding_models as cases
import pytest

from monoblock.cli.export import ExportFormat, ExportTask
from monoblock.conversion import onnx
from monoblock.conversion.onnx import FORMATS, TASKS, ExportOptions, export_onnx
from monoblock.errors import CheckpointError


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monoblock.cli", "export", *args]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def test_choices_equal_those_of_the_library() -> None:
    assert [member.value for member in ExportTask] == list(TASKS)
    assert tuple(ExportFormat) == FORMATS


def test_usage_errors(tmp_path: Path) -> None:
    result = run(str(tmp_path), str(tmp_path / "out"), "--format", "openvino", "--quantize", "int8")
    assert result.returncode == 2 and "NNCF" in result.stderr
    result = run(str(tmp_path), str(tmp_path / "out"), "--task", "translation")
    assert result.returncode == 2 and "text-generation-with-past" in result.stderr


@pytest.mark.parametrize(
    "options",
    [{"task": "translation"}, {"format": "tflite"}, {"quantize": "int4"}],
    ids=["task", "format", "quantize"],
)
def test_invalid_options(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected (one of|None or)"):
        export_onnx(tmp_path, tmp_path / "out", ExportOptions(**options))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "installed", lambda name: name not in ("onnxscript", "openvino"))
    with pytest.raises(ImportError, match=r'needs onnxscript: pip install "monoblock\[export\]"'):
        export_onnx(tmp_path, tmp_path / "out")
    with pytest.raises(ImportError, match=r'needs onnxscript and openvino: pip .*\[openvino\]"'):
        export_onnx(tmp_path, tmp_path / "out", ExportOptions(format="openvino"))
    monkeypatch.setattr(onnx, "installed", lambda name: True)
    monkeypatch.setattr(importlib.import_module("torch"), "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"PyTorch 2\.13 or newer, and 2\.9\.1 is installed"):
        export_onnx(tmp_path, tmp_path / "out")


def test_targets_and_models_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is exported."""
    monkeypatch.setattr(onnx, "installed", lambda name: True)
    monkeypatch.setattr(onnx, "_TORCH", (2, 0))
    source = cases.write(tmp_path / "source", "GPTNeo")
    (tmp_path / "full" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="--force"):
        export_onnx(source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="no model folder"):
        export_onnx(source, tmp_path / "full", ExportOptions(force=True))
    with pytest.raises(CheckpointError, match="is the source"):
        export_onnx(source, source, ExportOptions(force=True))
    with pytest.raises(CheckpointError, match=r"lm_head|no weights for GPTNeoForQuestionAnswering"):
        export_onnx(source, tmp_path / "out", ExportOptions(task="question-answering"))
    with pytest.raises(ValueError, match="AutoModelForMaskedLM has no class for 'gpt_neo'"):
        export_onnx(source, tmp_path / "out", ExportOptions(task="fill-mask"))
    classifier = cases.write(tmp_path / "classifier", "GPTNeo", "ForSequenceClassification")
    config = classifier / "config.json"
    config.write_text(config.read_text().replace('"pad_token_id": 1', '"pad_token_id": null'))
    with pytest.raises(ValueError, match="set pad_token_id"):
        export_onnx(classifier, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
