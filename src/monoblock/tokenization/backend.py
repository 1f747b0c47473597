"""The Rust library under a tokenizer, kept from what it does not survive, and its faults made into errors.

It trusts a file's tables and the lengths in them: a damaged one makes it panic, which is a BaseException, take
gigabytes, or overflow its stack, which ends the process. So such files are refused before it sees them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from monoblock.checkpoint.json_text import MAX_JSON_BYTES, parsed
from monoblock.errors import CheckpointError, FieldError, HubError, UnsupportedConfig
from monoblock.tokenization import charsmap

# Characters of a token or any other text in a tokenizer.json: its tries are as deep as the longest token, and are freed
# by functions that call themselves. The longest that is known has some 1,000.
MOST_TEXT = 4096
# Characters of a regular expression: Mistral's tokenizers need 22,000, an alternative for each special token.
MOST_PATTERN = 1 << 20

_OURS = (CheckpointError, FieldError, HubError, UnsupportedConfig)
# An ASCII letter need not be escaped; one that is may hide a name from a search.
_HIDDEN = re.compile(rb"\\u00[4-7]")


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of Rust code."""
    return type(error).__name__ == "PanicException"


@contextmanager
def faults(
    path: str | Path,
    what: str = "is refused by the tokenizer's backend",
    advice: str = "fetch or write it again",
) -> Generator[None]:
    """Turns what the backend raises, panics too, into CheckpointError that names the file."""
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError | RecursionError) or not (
            isinstance(error, Exception) or is_panic(error)
        ):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} {what} ({reason}): {advice}") from None


def read_backend(path: Path) -> Tokenizer:
    """The backend of a tokenizer.json; HubError without one, CheckpointError for one that is damaged."""
    if not path.is_file():
        raise HubError(f"{path} does not exist; give the path of a tokenizer.json")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror or error}") from error
    check(raw, path)
    with faults(path, "is not a tokenizer file"):
        return Tokenizer.from_buffer(raw)


def check(raw: bytes, path: Path | str) -> None:
    """CheckpointError for the text of a tokenizer.json that the backend would not survive."""
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {len(raw):,} bytes; expected at most {MAX_JSON_BYTES:,}")
    # Between two quotes that are not escaped there is a string, or what stands between strings.
    bare = raw.replace(b"\\\\", b"..").replace(b'\\"', b"..")
    if max(map(len, bare.split(b'"'))) <= MOST_TEXT and b"recompiled" not in raw and not _HIDDEN.search(raw):
        return
    for key, text in _texts(parsed(raw, path)):
        if key == "precompiled_charsmap":
            try:
                fault = charsmap.fault(base64.b64decode(text, validate=True))
            except (binascii.Error, ValueError):
                fault = "it is not base64"
            if fault is not None:
                raise CheckpointError(f"{path} has a damaged precompiled_charsmap ({fault}): fetch it again")
        elif len(text) > (most := MOST_PATTERN if key == "Regex" else MOST_TEXT):
            what = "regular expression" if key == "Regex" else "text"
            raise CheckpointError(
                f"{path} holds a {what} of {len(text):,} characters; expected at most {most:,}"
            )


def _texts(content: object) -> Iterator[tuple[str, str]]:
    """All strings of a JSON value, the keys of its objects too, each with the key that it stands under."""
    rest: list[tuple[str, object]] = [("", content)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            rest += fields.items()
            rest += (("", name) for name in fields)
        elif isinstance(value, list):
            rest += ((key, item) for item in cast("list[Any]", value))
