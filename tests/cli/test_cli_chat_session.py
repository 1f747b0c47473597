"""Commands of a `monoblock chat` session: settings, multi-line messages, files, images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from terminal import Terminal
from test_cli_chat import TEMPLATE, chat, pipe


def ask(terminal: Terminal, line: str) -> str:
    terminal.type(line + "\n")
    return terminal.expect("\n> ")


def calls(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_set_and_undo(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with chat(*TEMPLATE, "max_new_tokens=9", env={"FAKE_LOG": str(log)}) as terminal:
        terminal.expect("\n> ")
        assert "max_new_tokens = 9" in ask(terminal, "/set")
        ask(terminal, "/set temperature 0.7")
        ask(terminal, "/set top_p=0.9")
        assert "re: user=\n[9 tokens in" in ask(terminal, "hello")
        for command, message in (
            ("/set temprature 1", "did you mean temperature?"),
            ("/set top_p 2", "expected a number of at least 0 and at most 1"),
            ("/set do_sample False", "drop it or temperature, top_p"),
            ("/set top_p", "needs a value"),
            ("/set seed -1", "at least 0"),
            ("/set num_beams 3", "no setting of a chat"),
            ("/set watermarking_config {}", "not implemented"),
        ):
            reply = ask(terminal, command)
            assert message in reply, reply
            assert reply.count("monoblock:") == 1
        ask(terminal, "/undo")
        ask(terminal, "/set top_p none")
        ask(terminal, "/set temperature 0")
        ask(terminal, "again")
    first, second = calls(log)
    assert first | {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_new_tokens": 9} == first
    assert second["prompt"] == "user=again"
    assert second["do_sample"] is False
    assert not second.keys() & {"top_p", "temperature"}


def test_multi_line_messages() -> None:
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        terminal.type("one \\\n")
        terminal.expect(". ")
        assert "re: user=one \ntwo\n" in ask(terminal, "two")
        ask(terminal, "/clear")
        terminal.type('"""\n')
        terminal.expect(". ")
        terminal.type("/set\n")
        terminal.expect(". ")
        assert "re: user=/set\n\n  x\n" in ask(terminal, '\n  x\n"""')  # not a command
        ask(terminal, "/undo")
        terminal.type('"""dropped\n')
        terminal.expect(". ")
        terminal.interrupt_prompt()
        terminal.expect("\n> ")
        assert "re: user=next\n" in ask(terminal, "next")
    result = pipe('"""a\nb"""\nc\\\nd\n', *TEMPLATE)
    assert result.stdout == "re: user=a\nb\nre: user=a\nb|assistant=re: user=a\nb|user=c\nd\n"
    broken = pipe('"""a\nb\n', *TEMPLATE)
    assert (broken.returncode, broken.stdout) == (1, "")
    assert "ends inside a block" in broken.stderr


def test_save_and_load(tmp_path: Path) -> None:
    file, corrupt, invalid = tmp_path / "talk.json", tmp_path / "corrupt.json", tmp_path / "invalid.json"
    corrupt.write_text('{"messages": ')
    invalid.write_text('{"messages": [], "settings": {"top_p": 7}}')
    with chat(*TEMPLATE, "--system", "s", "temperature=0.5") as terminal:
        terminal.expect("\n> ")
        ask(terminal, "hi")
        assert "Saved 2 messages" in ask(terminal, f"/save {file}")
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        assert "Loaded 2 messages" in ask(terminal, f"/load {file}")
        for path, message in (
            (corrupt, "not a conversation"),
            (invalid, "settings"),
            (tmp_path / "no", "No such"),
        ):
            reply = ask(terminal, f"/load {path}")
            assert message in reply.replace("\n", " ")
            assert reply.count("monoblock:") == 1
        assert "temperature = 0.5" in ask(terminal, "/set")  # unchanged
        assert "re: system=s|user=hi|assistant=re: system=s|user=hi|user=more\n" in ask(terminal, "more")
        assert [path.name for path in tmp_path.glob("*tmp*")] == []
        terminal.type("/exit\n")
        assert terminal.end() == 0


def test_images_are_refused_by_text_models() -> None:
    with chat(*TEMPLATE) as terminal:
        terminal.expect("\n> ")
        assert "with-template takes no images" in ask(terminal, "/image cat.png")
        assert "tokens/s" in ask(terminal, "still here")
        assert "no message to undo" in ask(terminal, "/clear\n/undo") + terminal.expect("\n> ")


def test_arguments_of_transformers_chat(tmp_path: Path) -> None:
    """As in transformers' documentation."""
    log, template = tmp_path / "log", tmp_path / "template.jinja"
    template.write_text("T")
    result = pipe(
        "My favourite condiment is\n",
        *("with-template", "max_new_tokens=64", "do_sample=False", "eos_token_id=[1,2]", "--dtype", "auto"),
        *(
            "--device",
            "0",
            "--attn_implementation",
            "sdpa",
            "--system-prompt",
            "s",
            "--template",
            str(template),
        ),
        env={"FAKE_LOG": str(log)},
    )
    assert result.stdout == "re: system=s|user=My favourite condiment is\n", result.stderr
    [call] = calls(log)
    assert call | {"max_new_tokens": 64, "do_sample": False, "eos_token_id": [1, 2]} == call


def test_device_numbers() -> None:
    from monoblock.cli.engine import device_map

    assert (device_map("0"), device_map("cpu"), device_map("mps")) == ("cuda:0", None, "mps")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.7", 0.7),
        ("True", True),
        ("false", False),
        ("[1,2]", [1, 2]),
        ("none", None),
        ("a b", "a b"),
        ("{1}", "{1}"),
    ],
)
def test_literals_of_settings(text: str, value: object) -> None:
    from monoblock.cli.settings import literal

    assert literal(text) == value
