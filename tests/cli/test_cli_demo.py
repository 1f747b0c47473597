"""End-to-end tests of the command line with the embedded demo model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from terminal import CTRL_C, Terminal

pytest.importorskip("torch")

CLI = ("-m", "monoblock.cli")


def run(*args: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *CLI, *args]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120)


def test_generate_is_reproducible_with_a_seed() -> None:
    first = run("generate", "def fibonacci(n):", "--max-new-tokens", "24", "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert "\n    " in first.stdout  # an indented body
    assert "24 tokens in" in first.stderr
    assert (
        run("generate", "def fibonacci(n):", "--max-new-tokens", "24", "--seed", "1").stdout == first.stdout
    )


def test_greedy_options_and_stop_strings() -> None:
    greedy = run("generate", "import ", "-n", "8", "-t", "0", "--quiet")
    assert greedy.returncode == 0, greedy.stderr
    assert greedy.stderr == ""
    assert run("generate", "import ", "-n", "8", "--top-k", "1", "--quiet").stdout == greedy.stdout
    whole = run("generate", "def f(x):", "-n", "40", "-t", "0", "--quiet").stdout
    stopped = run("generate", "def f(x):", "-n", "40", "-t", "0", "--quiet", "--stop", whole[8:12]).stdout
    assert whole.startswith(stopped.removesuffix("\n"))
    assert whole[8:12] in stopped
    assert len(stopped) < len(whole)


def test_chat_in_a_pipe() -> None:
    result = run("chat", "-n", "12", "--seed", "3", text="def add(a, b):\n/retry\n")
    assert result.returncode == 0, result.stderr
    assert "no chat template" not in result.stderr
    assert "tokens/s" not in result.stderr  # speeds are printed in terminals only


def test_the_demo_answers_in_a_chat_and_completes_otherwise() -> None:
    """`chat` adds the adapter, `generate` does not."""
    talk = run("chat", "-t", "0", "--repetition-penalty", "1", text="Hello\n")
    assert talk.stdout.startswith("Hello! Ask me"), talk.stderr
    text = "<|user|>Hello<|assistant|>"
    code = run("generate", text, "-t", "0", "--repetition-penalty", "1", "-n", "12", "--quiet")
    assert code.returncode == 0 and not code.stdout.startswith("Hello!")


def test_ctrl_c_stops_a_reply_in_a_terminal() -> None:
    with Terminal([*CLI, "chat", "--temperature", "9", "--top-p", "1", "-n", "3000"]) as terminal:
        terminal.expect("\n> ", seconds=60)
        terminal.type("class Stack:\n")
        terminal.expect("class Stack:\n")  # echo of the terminal
        terminal.expect(" ", seconds=60)  # at this temperature the reply would be long
        terminal.type(CTRL_C)
        assert "stopped" in terminal.expect("\n> ")
        terminal.type("/exit\n")
        assert terminal.end() == 0


def test_info_counts_the_parameters_of_the_model() -> None:
    from monoblock import AutoModelForCausalLM, demo

    found = json.loads(run("info", "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(demo.path())
    assert found["model"] == "the embedded demo"
    assert found["parameters"] == model.num_parameters()
    assert sum(found["stored"].values()) == found["parameters"]
    assert sum(size for size in found["files"].values()) < 12 * 2**20  # limit on the package's size


def test_a_missing_model_is_an_error() -> None:
    result = run("generate", "x", "--model", "/no/such/folder")
    assert result.returncode == 1
    assert result.stderr.startswith("monoblock: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_prompts_that_are_not_utf8() -> None:
    """Undecodable bytes of arguments become lone surrogates."""
    result = run("generate", "ab\udcff", "-n", "2")
    assert result.returncode == 1
    assert result.stderr.startswith("monoblock: text holds the lone surrogate U+DCFF at index 2")
    assert run("generate", "a", "-n", "2", "-t", "1", "--seed", str(2**64 - 1)).returncode == 0
