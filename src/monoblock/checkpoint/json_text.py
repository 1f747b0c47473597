"""JSON of files from anywhere: its size, its depth and its number of values are bounded before anything uses them.

Python's values take up to twelve times the text's bytes, and functions that walk through nested values call
themselves: neither is a problem for any file of a model, and both are for a file that was made for it.
"""

import json
import re
from pathlib import Path
from typing import Any, cast

from monoblock.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20  # tokenizer.json and tekken.json, the largest, have up to 35 MB
MAX_CONTAINERS = 4_000_000  # objects and lists; each takes 56 bytes or more
MAX_DEPTH = 64

_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def parsed(raw: bytes, path: Path | str) -> Any:
    """The value of a JSON text; `CheckpointError` names the file and the place where it breaks."""
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {len(raw):,} bytes of JSON; expected at most {MAX_JSON_BYTES:,}")
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > MAX_CONTAINERS:
        raise CheckpointError(f"{path} holds over {MAX_CONTAINERS:,} objects and lists: it is no model's")
    try:
        content: object = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: it is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch or write it again") from error
    if (half := _half_character(raw)) is not None:
        raise CheckpointError(
            f"{path} has half a character (a lone surrogate) at byte {half}: fetch it again"
        )
    if containers > MAX_DEPTH and _deeper(content, MAX_DEPTH):
        raise CheckpointError(f"{path} is nested more than {MAX_DEPTH} levels deep: it is no model's")
    return content


def _half_character(raw: bytes) -> int | None:
    """Where half of a surrogate pair is escaped, if anywhere: it is no character, and cannot be written."""
    if not (b"\\ud" in raw or b"\\uD" in raw):
        return None
    first: re.Match[bytes] | None = None  # the first half of a pair, if the last escape was one
    for escape in _ESCAPE.finditer(raw):
        code = int(escape[1], 16) if escape[1] else 0
        second = 0xDC00 <= code < 0xE000
        if first is not None and not (second and escape.start() == first.end()):
            return first.start()
        if first is None and second:
            return escape.start()
        first = escape if 0xD800 <= code < 0xDC00 else None
    return None if first is None else first.start()


def _deeper(value: object, depth: int) -> bool:
    """Whether a value is nested deeper than that; without recursion."""
    level: list[object] = [value]
    for _ in range(depth):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += cast("dict[str, object]", item).values()
            elif isinstance(item, list):
                inner += cast("list[object]", item)
        if not inner:
            return False
        level = inner
    return any(isinstance(item, dict | list) for item in level)
