"""Readable labels of tokens, and their width on a terminal."""

from __future__ import annotations

import unicodedata
from typing import Any

SPACE, LINE_END = "␣", "↵"
_SHOWN = {" ": SPACE, "\n": LINE_END, "\t": "⇥", "\u00a0": SPACE, "\u3000": SPACE * 2}
# Variation selectors, joiners and skin tones, with which the width of the preceding character depends on the terminal.
_DROPPED = {*range(0xFE00, 0xFE10), *range(0x1F3FB, 0x1F400)}
_FLAGS = range(0x1F1E6, 0x1F200)


def readable(text: str) -> str:
    """The text with visible spaces and line ends, without control characters and characters of uncertain width."""
    return "".join(map(_readable, text))


def _readable(character: str) -> str:
    code, kind = ord(character), unicodedata.category(character)
    if character in _SHOWN:
        return _SHOWN[character]
    if code in _DROPPED or kind == "Cf":
        return ""
    if code in _FLAGS:
        return chr(ord("A") + code - _FLAGS.start)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{REPLACEMENT CHARACTER}" if kind in ("Cc", "Cn", "Co", "Cs", "Zl", "Zp") else character


def clusters(text: str) -> list[str]:
    """The characters of the text, each with its combining marks."""
    characters: list[str] = []
    for character in text:
        if characters and not _columns(character):
            characters[-1] += character
        else:
            characters.append(character)
    return characters


def width(text: str) -> int:
    """The number of terminal columns of a readable text."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    # Hangul's medial and final letters combine with the syllable before them.
    if unicodedata.category(character) in ("Mn", "Me") or 0x1160 <= ord(character) < 0x1200:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clipped(text: str, columns: int) -> str:
    """The text in at most `columns`, with … instead of its end."""
    if width(text) <= columns:
        return text
    kept, room = "", columns - 1
    for character in clusters(text):
        if (room := room - width(character)) < 0:
            break
        kept += character
    return kept + "…"


class TokenLabels:
    """The labels of a tokenizer's ids: decoded bytes, and special tokens unchanged."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset[int](tokenizer.all_special_ids)
        decoder = tokenizer.backend_tokenizer.decoder
        self.bytes = (
            _byte_alphabet() if decoder is not None and b'"ByteLevel"' in decoder.__getstate__() else {}
        )

    def __call__(self, index: int) -> str:
        """The label of an id; an id outside the vocabulary is shown as a number."""
        token: str | None = self.tokenizer.convert_ids_to_tokens(index)
        if token is None:
            return f"[{index}]"
        return readable(token if index in self.special else self._text(token)) or f"[{index}]"

    def _text(self, token: str) -> str:
        if self.bytes:
            if not all(character in self.bytes for character in token):
                return token
            raw = bytes(self.bytes[character] for character in token)
            try:
                return raw.decode()
            except UnicodeDecodeError:
                return "".join(f"<{byte:02X}>" if byte > 0x7F else chr(byte) for byte in raw)
        if token.endswith("</w>"):  # GPT-1's end of a word
            return token.removesuffix("</w>") + SPACE
        return LINE_END if token == "<0x0A>" else token.replace("▁", SPACE)


def _byte_alphabet() -> dict[str, int]:
    """The character for each byte in byte-level tokenizers: itself if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
