"""Tools: the schema of calls that must come, and calls read from a model's text.

Two formats are read: Mistral's `[TOOL_CALLS]` with a JSON list or with `name[ARGS]{...}`, and a JSON object (or a list
of them) with "name" and "arguments" (or "parameters") that is the whole text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.models import TOOL_CALLS

MARKERS = (TOOL_CALLS, "[CALL_ID]", "[ARGS]")
ALPHABET = string.ascii_letters + string.digits
ID_LENGTH = 9  # Mistral's templates accept no other
_OPENING = re.compile(r"\s*(\[\s*)?\{")
_NAMED = re.compile(r"\s*([a-zA-Z0-9_.-]{1,64})\s*(?:\[CALL_ID\]([a-zA-Z0-9]+))?\s*\[ARGS\]\s*")
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def content(self) -> dict[str, Any]:
        """As in an assistant's message."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def new_id() -> str:
    """An id of a call."""
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))


def call_of(value: Any, names: frozenset[str], given: str | None = None) -> ToolCall | None:
    """The call that a JSON value describes; None if it is none, or of a function that was not offered."""
    if not isinstance(value, dict):
        return None
    found = cast("dict[str, Any]", value)
    name, arguments = found.get("name"), found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return None
    if name not in names or not isinstance(arguments, dict) or not found.keys() <= CALL_KEYS:
        return None
    own = found.get("id", given)
    valid = isinstance(own, str) and re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", own)
    return ToolCall(cast(str, own) if valid else new_id(), name, json.dumps(arguments, ensure_ascii=False))


CALL_KEYS = {"name", "arguments", "parameters", "id", "type"}

# ---------------------------------------------------------------------------- calls that must come


def forced_schema(
    functions: Sequence[tuple[str, Mapping[str, Any] | None]], *, several: bool
) -> dict[str, Any]:
    """The JSON schema of a list of calls of these functions (name, schema of the arguments), at least one."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for index, (name, parameters) in enumerate(functions):
        key = f"tool{index}"
        schema = dict(parameters or {"properties": {}, "additionalProperties": False})
        schema.setdefault("type", "object")
        definitions[key] = _relocated(schema, f"#/$defs/{key}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{key}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    limits = {"minItems": 1} if several else {"minItems": 1, "maxItems": 1}
    return {"type": "array", "items": items, **limits, "$defs": definitions}


def _relocated(value: Any, root: str) -> Any:
    """A schema whose references to its own root lead to `root`."""
    if isinstance(value, list):
        return [_relocated(item, root) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, item in cast("dict[str, Any]", value).items():
        if key == "$ref" and isinstance(item, str) and item.startswith("#"):
            found[key] = root + item[1:]
        else:
            found[key] = _relocated(item, root)
    return found


def offered(
    functions: Sequence[tuple[str, Any]], choice: Any, param: str = "tool_choice"
) -> tuple[frozenset[str], str | None]:
    """The names of the offered functions, and the one that must be called; ApiError for one that is not offered."""
    names = frozenset(name for name, _ in functions)
    if len(names) < len(functions):
        raise ApiError("two tools have the same name", param="tools", code="invalid_value")
    if choice is None or isinstance(choice, str):
        return names, None
    wanted: str = choice.function.name if hasattr(choice, "function") else choice.name
    if wanted not in names:
        raise ApiError(
            f"tool_choice names {wanted!r}, which is not in tools", param=param, code="invalid_value"
        )
    return names, wanted


# ---------------------------------------------------------------------------- text to calls


@dataclass
class ToolParser:
    """Reads calls from a text that comes in pieces.

    `names`: the offered functions. `inside`: the text begins within a list of calls (the constraint of `tool_choice`
    makes it so). `single`: only the first call is returned. `hidden`: special tokens that are removed from the text.
    """

    names: frozenset[str]
    inside: bool = False
    single: bool = False
    hidden: tuple[str, ...] = ()
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    _rest: str = ""
    _state: str = "start"  # then text, calls (after Mistral's marker) or whole (JSON from the start)

    def __post_init__(self) -> None:
        self.hidden = tuple(token for token in self.hidden if token not in MARKERS)
        if self.inside:
            self._state = "calls"

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """New text; returns what is certain to be no call, and the calls that are now complete."""
        self._rest += text
        if self._state in ("calls", "whole") and "}" not in text:
            return "", []  # no call is complete
        return self._read(final=False)

    def end(self) -> tuple[str, list[ToolCall]]:
        """The rest at the end of the text: an incomplete call is text."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> tuple[str, list[ToolCall]]:
        text = ""
        calls: list[ToolCall] = []
        if self._state in ("start", "text"):
            text = self._text(final)
        if self._state == "calls":
            calls = self._calls()
            if final and self._rest.strip(" \n,]"):
                text += self._rest.lstrip(" \n,]")  # cut off, or no call after all
            if final:
                self._rest = ""
        elif self._state == "whole" and final:
            calls = self._whole()
            text, self._rest = ("" if calls else self._rest), ""
        if self.single:
            calls = [] if self.calls else calls[:1]
        self.calls += calls
        return self._visible(text), calls

    def _text(self, final: bool) -> str:
        """The text before calls; a possible beginning of the marker is held back."""
        at = self._rest.find(TOOL_CALLS)
        if at >= 0:
            text, self._rest = self._rest[:at], self._rest[at + len(TOOL_CALLS) :]
            self._state = "calls"
            return text
        kept = 0 if final else _overlap(self._rest, (TOOL_CALLS, *self.hidden))
        if self._state == "start":
            start = self._visible(self._rest[: len(self._rest) - kept])
            # Text that begins like a JSON object may be one call, or a list of calls.
            if _OPENING.match(start):
                self._state = "whole"
                return ""
            if start.strip() in ("", "[") and not final:
                return ""
            self._state = "text"
        text, self._rest = self._rest[: len(self._rest) - kept], self._rest[len(self._rest) - kept :]
        return text

    def _calls(self) -> list[ToolCall]:
        """The complete calls after Mistral's marker."""
        found: list[ToolCall] = []
        while True:
            rest = self._rest.lstrip(
                " \n\t,[]" if not self._rest.lstrip().startswith(TOOL_CALLS) else " \n\t"
            )
            rest = rest.removeprefix(TOOL_CALLS).lstrip()
            name, given = None, None
            if (named := _NAMED.match(rest)) is not None:
                name, given, rest = named[1], named[2], rest[named.end() :]
            if not rest.startswith("{"):
                return found
            try:
                value, end = _decode(rest)
            except (ValueError, RecursionError):
                return found
            if name is not None:
                value = {"name": name, "arguments": value}
            call = call_of(value, self.names, given)
            if call is None:
                return found
            found.append(call)
            self._rest = rest[end:]

    def _whole(self) -> list[ToolCall]:
        """The calls of a text that is JSON as a whole."""
        try:
            value = json.loads(self._visible(self._rest))
        except (ValueError, RecursionError):
            return []
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        calls = [call_of(item, self.names) for item in values]
        return [call for call in calls if call is not None] if values and None not in calls else []

    def _visible(self, text: str) -> str:
        for token in self.hidden:
            if token in text:
                text = text.replace(token, "")
        return text


def _overlap(text: str, tokens: Sequence[str]) -> int:
    """The length of the longest end of a text that is a proper beginning of a token."""
    longest = max(map(len, tokens)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(len(token) > size and token.startswith(end) for token in tokens):
            return size
    return 0
