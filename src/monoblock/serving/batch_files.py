"""The files of `monoblock batch`: requests in, results out, in OpenAI's batch format.

Results are appended as they come, in groups that are flushed to the disk. A result's id is a digest of its request and
of everything else that it depends on, so that a run that is resumed finds what is done, and notices when the input is
another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.journal import sync
from monoblock.checkpoint.locks import exclusive
from monoblock.field_types import brief

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
KEYS = ("custom_id", "method", "url", "body")
LONGEST_ID = 512  # characters of a custom_id


@dataclass(frozen=True)
class BatchLine:
    """A request of the input. `id`: of its result."""

    custom_id: str
    url: str
    body: dict[str, Any]
    id: str


def read_lines(path: Path, options: str) -> Iterator[BatchLine]:
    """The requests of a file. `options`: everything beside a request that its result depends on.

    ValueError names the line that is no request, or whose custom_id occurred before.
    """
    seen: set[bytes] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = _line(raw, options)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            key = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
            if key in seen:
                raise ValueError(
                    f"{path}, line {number}: the custom_id {brief(line.custom_id)} occurred before"
                )
            seen.add(key)
            yield line


def _line(raw: bytes, options: str) -> BatchLine:
    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object with {', '.join(KEYS)}, got {brief(found)}")
    fields = cast("dict[str, Any]", found)
    if missing := [key for key in KEYS if key not in fields]:
        raise ValueError(f"{missing[0]} is missing: expected an object with {', '.join(KEYS)}")
    if unknown := [key for key in fields if key not in KEYS]:
        raise ValueError(f"unknown key {brief(unknown[0])}: expected {', '.join(KEYS)}")
    custom_id, method, url, body = (fields[key] for key in KEYS)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_ID or not _encodable(custom_id):
        raise ValueError(f"custom_id must be a text of 1 to {LONGEST_ID} characters, got {brief(custom_id)}")
    if method != "POST":
        raise ValueError(f"method must be POST, got {brief(method)}")
    if url not in URLS:
        raise ValueError(f"url must be one of {', '.join(URLS)}, got {brief(url)}")
    if not isinstance(body, dict):
        raise ValueError(f"body must be an object, got {brief(body)}")
    return BatchLine(custom_id, url, cast("dict[str, Any]", body), _digest(url, body, options))


def _encodable(text: str) -> bool:
    """Whether a text is without lone surrogates, which UTF-8 does not have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(url: str, body: Any, options: str) -> str:
    content = json.dumps([url, body, options], sort_keys=True).encode()
    return f"batch_req_{hashlib.sha256(content).hexdigest()[:32]}"


def record(line: BatchLine, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """The result of a request that was answered, also by an error."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": line.id, "custom_id": line.custom_id, "response": response, "error": None}


class BatchResults:
    """The output file of a run: `done` has the custom_ids of the results that it holds, with their ids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, str] = {}
        self.failed = 0  # of `done`: answered by an error
        self._size = 0
        self._file: Any = None

    @classmethod
    @contextmanager
    def opened(cls, path: Path, *, restart: bool = False, retry: bool = False) -> Generator[BatchResults]:
        """The results so far, ready for more. A last line that a killed process did not complete is cut off.

        `restart`: without what the file holds; `retry`: without the results that are errors.

        BlockingIOError: another process writes this file. ValueError: the file holds something else.
        """
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is no folder: create it, or choose another output")
        with exclusive(path.with_name(f"{path.name}.lock")):
            results = cls(path)
            if path.exists() and not restart:
                results._read()
                if retry and results.failed:
                    results._without_errors()
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(results._size)
                file.seek(results._size)
                results._file = file
                results._flush()
                sync(path.parent)
                yield results

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write results and flush them to the disk. ValueError for one that is there already."""
        for item in records:
            self._note(item)
        lines = [json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in records]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._flush()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _note(self, item: Mapping[str, Any]) -> None:
        custom_id = item["custom_id"]
        if custom_id in self.done:
            raise ValueError(f"{self.path} has two results of {brief(custom_id)}: --restart begins again")
        self.done[custom_id] = item["id"]
        self.failed += _is_error(item)

    def _read(self) -> None:
        """Read what is there. The file is valid up to `_size`."""
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # a killed process was writing it
                self._note(self._parsed(raw, number))
                self._size += len(raw)

    def _parsed(self, raw: bytes, number: int) -> Mapping[str, Any]:
        try:
            found: Any = json.loads(raw)
            if {"id", "custom_id", "response", "error"} <= found.keys() and isinstance(
                found["custom_id"], str
            ):
                return found
        except (ValueError, AttributeError, RecursionError):
            pass
        raise ValueError(
            f"{self.path}, line {number}, is no result of a batch: choose another output, or replace the file with "
            "--restart"
        )

    def _without_errors(self) -> None:
        """Replace the file by one without the results that are errors."""
        kept = self.path.with_name(f"{self.path.name}.kept")
        self.done, self.failed, size = {}, 0, 0
        with self.path.open("rb") as old, kept.open("wb") as new:
            for raw in old:
                if raw.endswith(b"\n") and not _is_error(found := json.loads(raw)):
                    self._note(found)
                    new.write(raw)
                    size += len(raw)
            new.flush()
            os.fsync(new.fileno())
        kept.replace(self.path)
        self._size = size


def _is_error(item: Mapping[str, Any]) -> bool:
    response = item["response"]
    return item["error"] is not None or response is None or response["status_code"] != 200
