"""`monoblock bench`: its measurements and output, without bounds on speed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from monoblock import AutoModelForCausalLM, demo
from monoblock.cli import bench


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monoblock.cli", "bench", *args]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32").eval()


def test_json_of_the_demo() -> None:
    args = (
        "--prompt",
        "8",
        "--new",
        "2",
        "--batch",
        "2",
        "--batch",
        "1",
        "--runs",
        "2",
        "--dtype",
        "float32",
    )
    result = run(*args, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["model"], found["class"]) == ("the embedded demo", "MptForCausalLM")
    assert (found["weights"], found["device"]) == ("float32", "cpu")
    assert (found["prompt_tokens"], found["new_tokens"]) == (8, 2)
    assert list(found["decode"]) == ["2", "1"]
    for figure in (found["prompt"], *found["decode"].values()):
        assert len(figure["tokens_per_second"]) == 2
        assert min(figure["tokens_per_second"]) > 0
    one = found["decode"]["1"]
    speed = sum(one["tokens_per_second"]) / 2
    share = speed * found["weight_bytes_per_token"] / found["bandwidth"]
    assert one["bandwidth_share"] == pytest.approx(share)
    # The conditions of the measurement.
    assert found["kernels"] and found["threads"] > 0 and found["peak_memory"] > 0
    assert "decoding, batch size 2 ..." in result.stderr.splitlines()


def test_output_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "READ", 1 << 20)
    sizes = bench.Sizes(prompt=4, new=1, batch=[3], runs=1)
    found = bench.measure(str(demo.path()), {"dtype": "float32"}, "cpu", sizes, lambda what: None)
    lines = dict(bench._lines(found))
    assert lines["class"] == "MptForCausalLM, weights in float32, on cpu"
    assert lines["prompt of 4"].endswith(")")
    assert lines["decoding, batch size 3"].endswith("of the bandwidth")
    assert not capsys.readouterr().out


def test_runs_call_generate_with_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    calls: list[tuple[tuple[int, ...], int]] = []
    original = model.generate

    def generate(ids: torch.Tensor, **options: Any) -> Any:
        assert options["attention_mask"].shape == ids.shape
        assert int(ids.max()) < model.config.vocab_size
        calls.append((tuple(ids.shape), options["max_new_tokens"]))
        return original(ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    bench._decoding(model, 2, bench.Sizes(new=3, runs=2))
    shape = (2, bench.PROMPT)
    assert calls == [(shape, 4), *[(shape, 1), (shape, 4)] * 2]  # the first is a warm-up


class Untied(torch.nn.Module):
    """An embedding, a matrix, a head and a buffer, in two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.matrix, self.head = (
            torch.nn.Embedding(50, 4),
            torch.nn.Linear(4, 4),
            torch.nn.Linear(4, 50),
        )
        self.register_buffer("codes", torch.zeros(7, dtype=torch.uint8))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_weight_bytes_exclude_an_untied_embedding(model: Any) -> None:
    assert bench.weight_bytes(Untied()) == 4 * (16 + 4 + 200 + 50) + 7
    # The demo's head is tied to its embedding, which is therefore read.
    assert bench.weight_bytes(model) >= sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch", "0"), "--batch"),
        (("--prompt", "0"), "--prompt"),
        (("--new", "-1"), "--new"),
        (("--runs", "0"), "--runs"),
        (("--quantize", "int2"), "'int8', 'int4'"),
        (("--dtype", "int8"), "--dtype"),
    ],
)
def test_usage_errors(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not result.stdout


def test_a_folder_without_a_model(tmp_path: Any) -> None:
    result = run(str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("monoblock: ")
    assert str(tmp_path) in result.stderr
