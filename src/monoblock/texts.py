"""Validate input text: lone surrogates, and files that are not UTF-8."""

from __future__ import annotations

from pathlib import Path


def check_characters(text: str, name: str) -> None:
    """ValueError for a lone surrogate, which UTF-8 cannot encode; `errors="surrogateescape"` gives these for bytes that
    are not UTF-8. `name`: the argument, for the message."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}, which is no "
            "character: decode bytes with errors='replace', or remove it"
        ) from None


def read_text(path: Path) -> str:
    """The text of a file; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{byte:02X}; save it as UTF-8"
        ) from None
