"""Parse JSON from untrusted files, with limits on its size, its depth and its number of containers.

Parsed values take up to twelve times the bytes of the text, and code that walks nested values recurses. Files of models
stay far below the limits; a malicious file could otherwise exhaust memory or the stack.
"""

import json
import re
from pathlib import Path
from typing import Any, cast

from monoblock.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20  # tokenizer.json and tekken.json, the largest files, reach 35 MB
MAX_CONTAINERS = 4_000_000  # objects and lists; each takes 56 bytes or more
MAX_DEPTH = 64

_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def parsed(raw: bytes, path: Path | str) -> Any:
    """The value of a JSON text; `CheckpointError` names the file and the position of a syntax error."""
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {len(raw):,} bytes of JSON; expected at most {MAX_JSON_BYTES:,}")
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > MAX_CONTAINERS:
        raise CheckpointError(
            f"{path} holds over {MAX_CONTAINERS:,} objects and lists, more than any model file"
        )
    try:
        content: object = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: it is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch or write it again") from error
    if (at := _lone_surrogate(raw)) is not None:
        raise CheckpointError(f"{path} has a lone surrogate at byte {at}: fetch it again")
    if containers > MAX_DEPTH and _deeper(content, MAX_DEPTH):
        raise CheckpointError(f"{path} is nested more than {MAX_DEPTH} levels deep, more than any model file")
    return content


def _lone_surrogate(raw: bytes) -> int | None:
    """The offset of an escaped lone surrogate, if any: it is no character and cannot be encoded."""
    if not (b"\\ud" in raw or b"\\uD" in raw):
        return None
    first: re.Match[bytes] | None = None  # the last escape, if it was a high surrogate
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
    """Whether a value is nested deeper than `depth`; without recursion."""
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
