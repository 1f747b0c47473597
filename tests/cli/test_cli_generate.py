"""`monoblock generate` with a fake model: prompt sources, output, options, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import CTRL_C, Terminal

FAKE = str(Path(__file__).with_name("fake_monoblock.py"))


def run(*args: str, text: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FAKE, "generate", *args]
    return subprocess.run(
        command, capture_output=True, text=True, input=text, timeout=60, env=os.environ | (env or {})
    )


def test_stdout_has_the_completion_only() -> None:
    result = run("hello you")
    assert result.returncode == 0
    assert result.stdout == "re: hello you\n"
    assert re.fullmatch(
        r"\[13 tokens in [\d.]+ s(: [\d.]+ tokens/s)?; prompt: 9 tokens, [\d.]+ s\]\n", result.stderr
    )


def test_quiet() -> None:
    assert run("hello", "--quiet").stderr == ""


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
@pytest.mark.parametrize("args", [(), ("-",)])
def test_one_line_end_of_a_prompt_from_a_pipe_is_removed(args: tuple[str, ...], ending: str) -> None:
    assert run(*args, "--quiet", text=f"two\nlines{ending}").stdout == "re: two\nlines\n"


def test_prompt_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("größer\n\n", encoding="utf-8")
    assert run("--file", str(file), "--quiet").stdout == "re: größer\n"


def test_no_stream_has_the_same_output() -> None:
    assert run("a b c", "--no-stream", "--quiet").stdout == "re: a b c\n"


def test_echo() -> None:
    assert run("a", "--echo", "--quiet").stdout == "are: a\n"


def test_options_are_passed_to_generate(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = (
        "-n 4 -t 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 3 --stop x --stop yy"
    )
    assert run("abc", *options.split(), env={"FAKE_LOG": str(log)}).stdout == "re: \n"
    run("abc", env={"FAKE_LOG": str(log)})
    run("abc", "--temperature", "0", "--speculation", "suffix", env={"FAKE_LOG": str(log)})
    full, default, greedy = map(json.loads, log.read_text().splitlines())
    assert full == {
        "prompt": "abc",
        "max_new_tokens": 4,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 3,
        "stop_strings": ["x", "yy"],
    }
    assert default == {"prompt": "abc", "max_new_tokens": 128}
    assert greedy == {"prompt": "abc", "max_new_tokens": 128, "do_sample": False, "speculation": "suffix"}


def test_drafts_cannot_be_combined_with_shards() -> None:
    result = run("abc", "--speculation", "suffix", "--tensor-parallel", "2")
    assert result.returncode == 2
    assert "drop it or --tensor-parallel" in " ".join(result.stderr.replace("│", "").split())


def test_a_missing_model_exits_with_1() -> None:
    result = run("hello", "--model", "missing")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "monoblock: missing is not a folder, and the hub has no model of that name\n"


def test_a_missing_prompt_file_exits_with_1(tmp_path: Path) -> None:
    result = run("--file", str(tmp_path / "none"))
    assert result.returncode == 1
    assert result.stderr == f"monoblock: {tmp_path / 'none'}: No such file or directory\n"


def test_debug_shows_the_traceback() -> None:
    result = run("fail value", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ValueError: the model fell over" in result.stderr


def test_invalid_seeds_are_usage_errors() -> None:
    result = run("a", "--seed", str(10**23))
    assert result.returncode == 2
    assert "--seed" in result.stderr
    assert "18446744073709551615" in result.stderr


def test_a_prompt_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin"
    file.write_bytes(b"gr\xf6\xdfer")
    result = run("--file", str(file))
    assert result.returncode == 1
    assert result.stderr == f"monoblock: {file} is not UTF-8 text: byte 2 is 0xF6; save it as UTF-8\n"


def test_unexpected_errors_are_reported_without_a_traceback() -> None:
    result = run("fail key")
    assert result.returncode == 1
    assert "unexpected KeyError" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_sigint_keeps_the_partial_output_and_exits_with_130() -> None:
    command = [sys.executable, FAKE, "generate", "one two slow three"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.read(4) == "re: "  # streamed
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=20)
        assert process.returncode == 130
    assert "one two slow three".startswith(rest.removesuffix("\n"))
    assert "Traceback" not in error


def test_a_closed_pipe_exits_with_141_silently() -> None:
    command = [sys.executable, FAKE, "generate", "slow " * 20, "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.read(4)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=20) == 141


def test_terminals_show_the_prompt_without_control_characters() -> None:
    with Terminal([FAKE, "generate", "tab\tbell\x07 end"]) as terminal:
        assert terminal.end() == 0
        assert terminal.output.startswith(
            "tab\tbell\N{REPLACEMENT CHARACTER} endre: tab\tbell\N{REPLACEMENT CHARACTER} end\n"
        )


def test_a_missing_prompt_in_a_terminal_is_a_usage_error() -> None:
    with Terminal([FAKE, "generate"]) as terminal:
        assert terminal.end() == 2
        assert "a prompt is needed" in terminal.output


def test_ctrl_c_in_a_terminal() -> None:
    with Terminal([FAKE, "generate", "a slow one"]) as terminal:
        terminal.expect("re: ")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
