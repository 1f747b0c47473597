"""Validates SentencePiece's precompiled charsmap, which the tokenizers library trusts (it panics on a damaged one).

The format: the size of a trie in bytes (32 bits), the trie, and the replacements, each terminated by a zero byte. The
trie is a double array of 32-bit units (Darts-clone): from the unit at index p with offset o, byte c leads to the unit
at p ^ o ^ c; if the unit has a leaf, the unit at p ^ o holds the offset of the replacement.
"""

from __future__ import annotations

import numpy as np

_LEAF, _VALUE = np.uint32(1 << 8), np.uint32(1 << 31)


def first_error(charsmap: bytes) -> str | None:
    """A description of the first error in a charsmap; None if it is valid."""
    if len(charsmap) < 4:
        return "it is truncated"
    size = int.from_bytes(charsmap[:4], "little")
    if size > len(charsmap) - 4 or size % 4 or not size:
        return f"it is shorter than its trie of {size} bytes"
    replacements = charsmap[4 + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError:
        return "its replacements are not UTF-8 text"
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    if units[0] >= _VALUE:
        return "its trie has no root"
    nodes = np.flatnonzero(units < _VALUE)  # the others are values, which no byte leads to
    offsets = (units[nodes] >> 10) << ((units[nodes] & np.uint32(1 << 9)) >> 6)
    bases = nodes ^ offsets.astype(np.int64)
    if len(bases) and int((bases | 0xFF).max()) >= len(units):
        return "its trie has an index out of range"
    values = units[bases[units[nodes] & _LEAF != 0]] & ~_VALUE
    if len(values) and (int(values.max()) > len(replacements) or _inside(replacements, values)):
        return "its trie has an invalid replacement offset"
    return None


def _inside(replacements: bytes, starts: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> bool:
    """Whether any of the offsets is inside a UTF-8 character."""
    characters = np.frombuffer(replacements + b"\0", np.uint8)[starts]
    return bool(np.any((characters & 0xC0) == 0x80))
