"""`monoblock attention`: masks without a framework, attention weights of a model, files, usage errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import visualizer_cases
from terminal import Terminal
from typer.testing import CliRunner

import monoblock
from monoblock.cli.attention import app

CLASSES = {
    "mpt": "MptForCausalLM",
    "mistral": "MistralForCausalLM",
    "fuyu": "FuyuForCausalLM",
    "openai-gpt": "OpenAIGPTDoubleHeadsModel",
    "gpt_neo": "GPTNeoForTokenClassification",
    "mpnet": "MPNetForMaskedLM",
}
TEXT = visualizer_cases.TEXTS[0]


def run(*args: str, options: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "monoblock.cli", "attention", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


def invoke(*args: str) -> Any:
    """Runs the command in this process."""
    return CliRunner().invoke(app, args)


def saved(family: str, name: str, folder: Path) -> Any:
    """Saves a random model of that class and its tokenizer into a folder."""
    import torch

    torch.manual_seed(0)
    model = getattr(monoblock, name)(visualizer_cases.config(family)).eval()
    model.save_pretrained(folder)
    visualizer_cases.tokenizer(family).save_pretrained(folder)
    return model


def test_the_mask_of_the_demo_imports_no_framework() -> None:
    result = run("def f(x): return x", options=("-X", "importtime"))
    assert result.returncode == 0
    assert result.stdout.startswith("all 4 layers: causal\n")
    assert re.search(r"^x +3 (▓|█) █ █ █ · · ·$", result.stdout, re.MULTILINE)
    assert "\x1b" not in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "monoblock.utils.attention_visualizer" in imported  # the report was parsed
    assert not imported & {"torch", "jax", "tensorflow", "PIL"}


def test_colours_in_a_terminal() -> None:
    args = ("-m", "monoblock.cli", "attention", "def f(x):")
    with Terminal(args, env={"TERM": "xterm", "COLUMNS": "80"}) as terminal:
        terminal.expect("\x1b[38;5;87m██")
        terminal.expect("masked")
        assert terminal.end() == 0


def test_text_from_standard_input() -> None:
    assert "␣return 5" in run("-", input="def f(x): return x\n").stdout


@pytest.mark.parametrize("family", CLASSES)
def test_attention_weights_equal_those_of_the_model(family: str, tmp_path: Path) -> None:
    from monoblock.utils.attention_visualizer import AttentionMaskVisualizer
    from monoblock.utils.heatmap import Style, lines

    torch = pytest.importorskip("torch")
    model = saved(family, CLASSES[family], tmp_path)
    result = invoke(str(tmp_path), TEXT, "--layer", "1", "--head", "2")
    assert result.exit_code == 0, result.output
    visualizer = AttentionMaskVisualizer(tmp_path)
    visualizer.read(TEXT)
    ids = torch.tensor([visualizer.tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    [panel] = visualizer.weights([weights.numpy() for weights in attentions], layer=1, head=2)
    assert result.output == "\n".join(lines(panel, Style(80))) + "\n\n"


def test_layers_and_heads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    saved("mistral", "MistralModel", tmp_path)

    def titles(*args: str) -> list[str]:
        result = invoke("--model", str(tmp_path), "fox", *args, "--dtype", "float32", "--device", "cpu")
        return re.findall(r"^layer .*", result.output, re.MULTILINE)

    assert titles("--layer", "2") == ["layer 2, mean of all heads"]
    assert titles("--head", "mean") == [f"layer {i}, mean of all heads" for i in range(3)]
    assert titles("--layer", "0", "--head", "all") == [f"layer 0, head {i}" for i in range(6)]
    result = invoke(str(tmp_path), "fox", "--head", "0", "--html", str(tmp_path / "a.html"))
    assert result.exit_code == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("layer ") == 3 and "attention weights" in page


def test_files_replace_terminal_output(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    files = {kind: tmp_path / f"mask.{kind}" for kind in ("svg", "png", "html")}
    result = run("def f(x):", *(arg for kind, file in files.items() for arg in (f"--{kind}", str(file))))
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [f"wrote {file}" for file in files.values()]
    assert files["svg"].read_text().startswith("<svg")
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing argument"),
        (("a", "b", "c"), "one quoted text"),
        (("a", "b", "--model", "c"), "give one model"),
        (("",), "the text is empty"),
        (("x", "--head", "most"), "--head must be a number, mean or all"),
        (("x", "--layer", "4"), "the layer must be 0 to 3, got 4"),
        (("x", "--layer", "-1"), "--layer"),
        (("x", "--head", "6"), "the head must be 0 to 5"),
        (("x", "--dtype", "float16"), "need --layer or --head"),
        (("x", "--device", "cpu"), "need --layer or --head"),
    ],
)
def test_usage_errors(args: tuple[str, ...], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = run(str(tmp_path / "nowhere"), "fox", "--offline")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("monoblock: ")
    assert len(result.stderr.splitlines()) == 1
    (tmp_path / "file").touch()
    unwritable = run("fox", "--svg", str(tmp_path / "file" / "a.svg"))
    assert unwritable.returncode == 1
    assert len(unwritable.stderr.splitlines()) == 1
