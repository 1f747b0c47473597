"""A conversation: a system prompt and turns, which can be saved with the settings as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from monoblock.cli.engine import Message


@dataclass
class Conversation:
    """A system prompt, and turns that alternate between "user" and "assistant", starting with "user"."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list[Message])

    def messages(self) -> list[Message]:
        """All messages, the system prompt first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def say(self, text: str, image: str | None = None) -> None:
        """Add a user message, optionally with the path of an image."""
        self.turns.append({"role": "user", "content": text} | ({} if image is None else {"image": image}))

    def answer(self, text: str) -> None:
        """Add a reply of the model."""
        self.turns.append({"role": "assistant", "content": text})

    def image(self) -> str | None:
        """The path of the conversation's image, if it has one."""
        return next((turn["image"] for turn in self.turns if "image" in turn), None)

    def drop_last(self) -> None:
        """Remove the last message, which was not answered."""
        self.turns.pop()

    def drop_reply(self) -> None:
        """Remove the last reply, so that its message can be answered again; ValueError if there is none."""
        if not self.turns:
            raise ValueError("there is no message to answer again yet")
        self.turns.pop()

    def undo(self) -> None:
        """Remove the last message and its reply; ValueError if there is none."""
        if not self.turns:
            raise ValueError("there is no message to undo")
        del self.turns[-2:]

    def clear(self) -> None:
        """Remove all turns; the system prompt stays."""
        self.turns.clear()

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write messages and settings as a JSON object, atomically."""
        from monoblock.checkpoint.files import write_atomically

        content = {"settings": settings, "messages": self.messages()}
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        write_atomically(path, lambda staged: staged.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> tuple[Conversation, dict[str, Any]]:
        """Read a file written by `save`, or a list of messages; ValueError names the file and the expected format."""
        text = path.read_bytes()
        try:
            content: object = json.loads(text)
            settings: object = {}
            if isinstance(content, dict):
                fields = cast(dict[str, Any], content)
                content, settings = fields["messages"], fields.get("settings", {})
            if not isinstance(content, list) or not isinstance(settings, dict):
                raise TypeError
            turns = [_message(item) for item in cast(list[Any], content)]
            system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
            if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f'{path} is not a conversation: expected JSON, {{"settings": {{...}}, "messages": [...]}} or only the '
                'list, of {"role": ..., "content": ...}: an optional system message, then "user" and "assistant" '
                "alternating"
            ) from None
        return cls(system, turns), cast(dict[str, Any], settings)


def _message(item: Mapping[str, Any]) -> Message:
    message = {name: item[name] for name in ("role", "content", "image") if name in item}
    if not isinstance(message["content"], str) or not isinstance(message.get("image", ""), str):
        raise TypeError
    return message
