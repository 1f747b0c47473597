"""The text of a sequence while its tokens come: complete characters, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monoblock.generation.streamers import TextStreamer


class TextAssembler(TextStreamer):
    """Decodes tokens one by one. `text` grows by complete characters."""

    def __init__(self, tokenizer: Any, context: Sequence[int], skip_special_tokens: bool) -> None:
        """`context`: the last tokens of the prompt, which some tokenizers need for a leading space."""
        super().__init__(tokenizer, skip_special_tokens=skip_special_tokens)
        self.text = ""
        self.next_tokens_are_prompt = False
        self._tokens, self._emitted = list(context), len(context)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Append the text."""
        del stream_end
        self.text += text


class StopText:
    """Releases the text of a sequence up to the first stop string, or to the longest tail that may begin one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self.stops, self.include = tuple(stops), include
        self.released = 0
        self._searched = 0
        self._longest = max(map(len, self.stops), default=0)

    def search(self, text: str) -> tuple[str, int] | None:
        """The earliest stop string in the new text and the end of the text that remains."""
        start = max(0, self._searched - self._longest + 1)
        self._searched = len(text)
        found = [(at, -len(stop), stop) for stop in self.stops if (at := text.find(stop, start)) >= 0]
        if not found:
            return None
        at, _, stop = min(found)
        return stop, at + len(stop) if self.include else at

    def release(self, text: str, end: int | None = None) -> str:
        """The text that can be given out; `end`: of a finished text."""
        if end is None:
            end = len(text) - self._held(text)
        new, self.released = text[self.released : end], max(self.released, end)
        return new

    def _held(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        longest = min(self._longest - 1, len(text) - self.released)
        for count in range(longest, 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self.stops if len(stop) > count):
                return count
        return 0
