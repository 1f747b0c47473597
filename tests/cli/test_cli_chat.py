"""`monoblock chat` with a fake model, in a pseudo-terminal and in a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import CTRL_C, CTRL_D, Terminal

FAKE = str(Path(__file__).with_name("fake_monoblock.py"))
TEMPLATE = ("--model", "with-template")


def chat(*args: str, env: dict[str, str] | None = None) -> Terminal:
    return Terminal([FAKE, "chat", *args], env)


def pipe(text: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FAKE, "chat", *args]
    return subprocess.run(
        command, capture_output=True, text=True, input=text, timeout=60, env=os.environ | (env or {})
    )


def test_a_conversation_keeps_its_history() -> None:
    with chat(*TEMPLATE, "--system", "be kind") as terminal:
        terminal.expect("\n> ")
        terminal.type("hello\n")
        assert "re: system=be kind|user=hello\n" in terminal.expect("\n> ")
        terminal.type("/system be brief\n")
        terminal.expect("\n> ")
        terminal.type("again\n")
        reply = terminal.expect("\n> ")
        assert "re: system=be brief|user=hello|assistant=re: system=be kind|user=hello|user=again\n" in reply
        terminal.type("/exit\n")
        assert terminal.end() == 0


def test_ctrl_c_stops_a_reply_and_exits_at_the_prompt() -> None:
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        terminal.type("a very slow one\n")
        terminal.expect("re: ")
        terminal.type(CTRL_C)
        assert "stopped" in terminal.expect("\n> ")
        terminal.type("next\n")
        reply = terminal.expect("\n> ")
        assert "user=a very slow one|assistant=re: " in reply  # the partial reply is kept
        assert "|user=next\n" in reply
        terminal.interrupt_prompt()
        assert terminal.end() == 130
        assert "Traceback" not in terminal.output


def test_ctrl_d_exits() -> None:
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_clear_retry_help_and_unknown_commands() -> None:
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        terminal.type("/retry\n")
        assert "no message to answer again" in terminal.expect("\n> ")
        terminal.type("first\n")
        terminal.expect("\n> ")
        terminal.type("/retry\n")
        assert "re: user=first\n" in terminal.expect("\n> ")
        terminal.type("/clear\n")
        terminal.expect("\n> ")
        terminal.type("second\n")
        assert "re: user=second\n" in terminal.expect("\n> ")
        terminal.type("/clean\n")
        assert "/clean is not a command" in terminal.expect("\n> ")
        terminal.type("/clear now\n")
        assert "takes no argument" in terminal.expect("\n> ")
        terminal.type("/save\n")
        assert "needs a file name" in terminal.expect("\n> ")
        terminal.type("/help\n")
        answer = terminal.expect("\n> ")
        assert all(
            f"{name} " in answer for name in ("/help", "/clear", "/save", "/system", "/retry", "/exit")
        )


def test_save_and_resume(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with chat(*TEMPLATE, "--system", "s") as terminal:
        terminal.expect("\n> ")
        terminal.type("hi\n")
        terminal.expect("\n> ")
        terminal.type(f"/save {file}\n")
        assert "Saved 2 messages" in terminal.expect("\n> ")
    assert json.loads(file.read_text()) == {
        "settings": {},
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "re: system=s|user=hi"},
        ],
    }
    result = pipe("more\n", *TEMPLATE, "--history", str(file), "--quiet")
    assert result.stdout == "re: system=s|user=hi|assistant=re: system=s|user=hi|user=more\n"
    # --history is written after each reply.
    assert json.loads(file.read_text())["messages"][3]["content"] == "more"


def test_a_failing_reply_does_not_end_a_chat() -> None:
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        terminal.type("fail value\n")
        assert "monoblock: the model fell over" in terminal.expect("\n> ")
        terminal.type("ok\n")
        assert "re: user=ok\n" in terminal.expect("\n> ")  # the failed message is dropped


def test_without_a_template_messages_are_concatenated() -> None:
    result = pipe("def f():\n\n    return\n", "--system", "# code")
    assert result.stdout == "re: # code\ndef f():\nre: # code\ndef f():\nre: # code\ndef f():\n    return\n"
    assert result.stderr.count("no chat template") == 1


def test_output_in_a_pipe_has_replies_only() -> None:
    result = pipe("one\n\n/clear\ntwo", *TEMPLATE, "--quiet")
    assert result.returncode == 0
    assert result.stdout == "re: user=one\nre: user=two\n"
    assert "\x1b" not in result.stdout + result.stderr


def test_retry_uses_another_seed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pipe("a\n/retry\n", *TEMPLATE, "--seed", "7", "-t", "0.8", env={"FAKE_LOG": str(log)})
    first, second = map(json.loads, log.read_text().splitlines())
    assert (first["seed"], second["seed"]) == (7, 8)
    assert first["prompt"] == second["prompt"] == "user=a"
    assert first["max_new_tokens"] == 512


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("fail value\nok\n", TEMPLATE, "the model fell over"),
        ("/nonsense\n", TEMPLATE, "/nonsense is not a command"),
        ("hi\n", ("--model", "missing"), "missing is not a folder"),
    ],
)
def test_errors_in_a_pipe_exit_with_1(text: str, args: tuple[str, ...], message: str) -> None:
    result = pipe(text, *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '[{"role": "user"}]',
        '[{"role": "user", "content": "x"}]',
        '[{"role": "tool", "content": "x"}]',
    ],
)
def test_an_invalid_history_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    result = pipe("hi\n", *TEMPLATE, "--history", str(file))
    assert result.returncode == 1
    assert f"{file} is not a conversation" in result.stderr
    assert file.read_text() == content
