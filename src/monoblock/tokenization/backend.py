"""Loads tokenizer.json into the Rust library, and converts the library's errors.

The library trusts the tables and lengths of a file: a damaged one makes it panic (a BaseException), allocate gigabytes,
or overflow the stack, which kills the process. Such files are therefore refused before they reach it.
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

# Maximum of characters of a token or any other string in a tokenizer.json: the library's tries are as deep as the
# longest token, and are freed recursively. The longest known string has about 1,000.
MOST_TEXT = 4096
# Maximum of characters of a regular expression: Mistral's need 22,000, with an alternative for each special token.
MOST_PATTERN = 1 << 20

_OWN_ERRORS = (CheckpointError, FieldError, HubError, UnsupportedConfig)
# A \u escape of an ASCII letter, which is never necessary and would hide a name from a search of the raw bytes.
_HIDDEN = re.compile(rb"\\u00[4-7]")


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of Rust code."""
    return type(error).__name__ == "PanicException"


@contextmanager
def backend_errors(
    path: str | Path,
    what: str = "is rejected by the tokenizers library",
    advice: str = "fetch or write it again",
) -> Generator[None]:
    """Converts errors and panics of the library into a CheckpointError that names the file."""
    try:
        yield
    except _OWN_ERRORS:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError | RecursionError) or not (
            isinstance(error, Exception) or is_panic(error)
        ):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} {what} ({reason}): {advice}") from None


def read_backend(path: Path) -> Tokenizer:
    """The backend of a tokenizer.json; HubError for a missing file, CheckpointError for a damaged one."""
    if not path.is_file():
        raise HubError(f"{path} does not exist; pass the path of a tokenizer.json")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror or error}") from error
    check(raw, path)
    with backend_errors(path, "is not a tokenizer file"):
        return Tokenizer.from_buffer(raw)


def check(raw: bytes, path: Path | str) -> None:
    """CheckpointError for the content of a tokenizer.json that would crash the library."""
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {len(raw):,} bytes; expected at most {MAX_JSON_BYTES:,}")
    # Splitting at unescaped quotes gives the strings and the text between them.
    bare = raw.replace(b"\\\\", b"..").replace(b'\\"', b"..")
    if max(map(len, bare.split(b'"'))) <= MOST_TEXT and b"recompiled" not in raw and not _HIDDEN.search(raw):
        return
    for key, string in _strings(parsed(raw, path)):
        if key == "precompiled_charsmap":
            try:
                first_error = charsmap.first_error(base64.b64decode(string, validate=True))
            except (binascii.Error, ValueError):
                first_error = "it is not base64"
            if first_error is not None:
                raise CheckpointError(
                    f"{path} has a damaged precompiled_charsmap ({first_error}): fetch it again"
                )
        elif len(string) > (most := MOST_PATTERN if key == "Regex" else MOST_TEXT):
            what = "regular expression" if key == "Regex" else "string"
            raise CheckpointError(
                f"{path} holds a {what} of {len(string):,} characters; expected at most {most:,}"
            )


def _strings(content: object) -> Iterator[tuple[str, str]]:
    """All strings of a JSON value, including keys, each with the key that it is stored under."""
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
