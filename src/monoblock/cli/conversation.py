"""A conversation: a system prompt and turns, in memory and as a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from monoblock.cli.engine import Message


@dataclass
class Conversation:
    """Turns alternate between "user" and "assistant", and start with the user's."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list[Message])

    def messages(self) -> list[Message]:
        """All of it as messages, the system prompt first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def say(self, text: str) -> None:
        """Adds a message of the user."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds a reply of the model."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Removes the last message, which got no answer."""
        self.turns.pop()

    def reopen(self) -> None:
        """Removes the last reply, so that its message can be answered again; ValueError if there is none."""
        if not self.turns:
            raise ValueError("there is no message to answer again yet")
        self.turns.pop()

    def clear(self) -> None:
        """Removes all turns; the system prompt stays."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Writes all messages as a JSON list, whole or not at all."""
        from monoblock.checkpoint.files import write_atomically

        text = json.dumps(self.messages(), ensure_ascii=False, indent=1) + "\n"
        write_atomically(path, lambda staged: staged.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Reads what `save` wrote; ValueError names the file and what is wrong with it."""
        wrong = ValueError(
            f'{path} is not a conversation: expected a JSON list of {{"role": ..., "content": ...}}, '
            'an optional system message first, then "user" and "assistant" in turn'
        )
        try:
            messages: list[Message] = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(message["role"], message["content"]) for message in messages]
            if not isinstance(messages, list):  # an empty object gets this far
                raise wrong
        except (ValueError, TypeError, KeyError):
            raise wrong from None
        system = pairs.pop(0)[1] if pairs and pairs[0][0] == "system" else None
        roles = [role for role, _ in pairs]
        if roles != ["user", "assistant"] * (len(pairs) // 2) or not all(
            isinstance(text, str) for _, text in pairs
        ):
            raise wrong
        return cls(system, [{"role": role, "content": text} for role, text in pairs])
