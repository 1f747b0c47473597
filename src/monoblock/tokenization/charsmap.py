"""SentencePiece's compiled table of replacements, checked: the backend trusts it, and panics where it is damaged.

It is a number of bytes (32 bits), a trie of so many bytes, and the replacements, each ended by a zero byte. The trie
is a double array of 32-bit units (Darts-clone): from the unit at place p with the offset o, the byte c leads to the
unit at p ^ o ^ c; if the unit has a leaf, the one at p ^ o holds where the replacement begins.
"""

from __future__ import annotations

import numpy as np

_LEAF, _VALUE = np.uint32(1 << 8), np.uint32(1 << 31)


def fault(charsmap: bytes) -> str | None:
    """What is wrong with a table, if anything."""
    if len(charsmap) < 4:
        return "it is cut off"
    size = int.from_bytes(charsmap[:4], "little")
    if size > len(charsmap) - 4 or size % 4 or not size:
        return f"its trie of {size} bytes is not in it"
    texts = charsmap[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        return "its replacements are not UTF-8 text"
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    if units[0] >= _VALUE:
        return "its trie has no root"
    nodes = np.flatnonzero(units < _VALUE)  # the others hold values, which no byte leads to
    offsets = (units[nodes] >> 10) << ((units[nodes] & np.uint32(1 << 9)) >> 6)
    bases = nodes ^ offsets.astype(np.int64)
    if len(bases) and int((bases | 0xFF).max()) >= len(units):
        return "its trie leads out of itself"
    values = units[bases[units[nodes] & _LEAF != 0]] & ~_VALUE
    if len(values) and (int(values.max()) > len(texts) or _inside(texts, values)):
        return "its trie leads to no replacement"
    return None


def _inside(texts: bytes, places: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> bool:
    """Whether any of the places is within a character."""
    characters = np.frombuffer(texts + b"\0", np.uint8)[places]
    return bool(np.any((characters & 0xC0) == 0x80))
