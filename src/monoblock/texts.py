"""Texts that come from outside: whether they are Unicode, and files of them."""

from __future__ import annotations

from pathlib import Path


def check_characters(text: str, name: str) -> None:
    """ValueError for a half of a UTF-16 pair without the other, as `errors="surrogateescape"` leaves for bytes that are
    no UTF-8: tokenizers read UTF-8, which has none. `name`: of the argument."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} as character {error.start}, which is no "
            "character: read bytes with errors='replace', or leave it out"
        ) from None


def read_text(path: Path) -> str:
    """A file's text; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is no UTF-8 text: byte {error.start} is 0x{byte:02X}; save it as UTF-8"
        ) from None
