"""Calls of tools in a model's text, however it is divided into deltas."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

pytest.importorskip("fastapi")

from monoblock.serving.server.tools import ToolCall, ToolParser, forced_schema

NAMES = frozenset({"add", "f"})
MISTRAL = (
    '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1, "s": "a}]\\""}, "id": "abcdefghi"}, '
    '{"name": "f", "arguments": {}}]'
)
NEWER = '[TOOL_CALLS]add[ARGS]{"x": 2}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}'
TWO = '[{"name": "f", "arguments": {}}, {"name": "add", "arguments": {}}]'


def parsed(text: str, cuts: list[int], **options: Any) -> tuple[str, list[ToolCall]]:
    """The text and the calls if the text comes in parts."""
    parser = ToolParser(NAMES, **options)
    shown, calls = "", list[ToolCall]()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        more, found = parser.add(text[start:end])
        shown, calls = shown + more, calls + found
    more, found = parser.end()
    assert parser.calls == calls + found
    return shown + more, calls + found


def divisions(text: str) -> list[list[int]]:
    """Whole, letter by letter, and some random ones."""
    draw = random.Random(0)
    some = [sorted(draw.sample(range(1, len(text)), min(5, len(text) - 1))) for _ in range(20)]
    return [[], list(range(1, len(text))), *some]


@pytest.mark.parametrize(
    ("text", "options", "shown", "calls"),
    [
        (MISTRAL, {}, "", [("add", {"x": 1, "s": 'a}]"'}), ("f", {})]),
        ("I call. " + MISTRAL, {}, "I call. ", [("add", {"x": 1, "s": 'a}]"'}), ("f", {})]),
        (MISTRAL, {"single": True}, "", [("add", {"x": 1, "s": 'a}]"'})]),
        (NEWER, {}, "", [("add", {"x": 2}), ("f", {})]),
        ('{"name": "add", "arguments": {"x": 3}}', {}, "", [("add", {"x": 3})]),
        (' {"name": "add", "parameters": {"x": 3}}\n', {}, "", [("add", {"x": 3})]),
        ('[{"name": "f", "arguments": "{}"}]', {}, "", [("f", {})]),
        (TWO, {"inside": True}, "", [("f", {}), ("add", {})]),
        ('</s>{"name": "f", "arguments": {}}</s>', {"hidden": ("</s>",)}, "", [("f", {})]),
        # No calls: another function, other keys, cut off, or plain text.
        ('{"name": "other", "arguments": {}}', {}, None, []),
        ('{"name": "f", "arguments": {}, "more": 1}', {}, None, []),
        ('{"name": "f", "arguments": {"x"', {}, None, []),
        ('{"name": "f", "arguments": [1]}', {}, None, []),
        ("[1] is a list, [TOOL_ is not a marker", {}, None, []),
        ("plain text</s> and more", {"hidden": ("</s>",)}, "plain text and more", []),
        ("[", {}, None, []),
        ("", {}, None, []),
    ],
)  # fmt: skip
def test_calls(text: str, options: Any, shown: str | None, calls: Any) -> None:
    for cuts in divisions(text) if text else [[]]:
        found, made = parsed(text, cuts, **options)
        assert found == (text if shown is None else shown), cuts
        assert [(call.name, json.loads(call.arguments)) for call in made] == calls, cuts
        assert all(len(call.id) == 9 for call in made)


def test_text_is_not_held_back() -> None:
    parser = ToolParser(NAMES)
    assert parser.add("Hello") == ("Hello", [])
    assert parser.add(" [TOOL") == (" ", [])
    assert parser.add("BOX]") == ("[TOOLBOX]", [])


def test_a_call_comes_when_it_is_complete() -> None:
    parser = ToolParser(NAMES)
    _, calls = parser.add('[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}}, {"name"')
    assert [call.name for call in calls] == ["add"]


def test_the_schema_of_calls_moves_references() -> None:
    point = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P"}},
        "$defs": {"P": {"type": "integer"}},
    }
    schema = forced_schema([("add", point), ("f", None)], several=False)
    assert schema["$defs"]["tool0"]["properties"]["p"] == {"$ref": "#/$defs/tool0/$defs/P"}
    assert schema["maxItems"] == 1 and len(schema["items"]["anyOf"]) == 2
    assert "maxItems" not in forced_schema([("f", None)], several=True)
