"""Bodies of requests: JSON with limits on its size, its depth and its characters."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, cast

from starlette.requests import ClientDisconnect, Request

from monoblock.serving.server.errors import ApiError, ClientGone
from monoblock.serving.server.settings import Limits


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request's body.

    ApiError: 415 for another type, 413 for a body that is too large, 408 for one that comes too slowly, 400 for one
    that is no JSON object.
    """
    headers = request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Browsers send other types to other origins without asking for permission.
        raise ApiError(
            f"the body's type is {kind or 'missing'}: send the header Content-Type: application/json",
            status=415,
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("compressed bodies are not supported: send the body as it is", status=415)
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limits.body:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            raw = await _collected(request, limits)
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {limits.body_seconds:g} s", status=408, code="request_timeout"
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    if len(raw) > 2**18:
        return await asyncio.to_thread(parsed_object, raw, limits)
    return parsed_object(raw, limits)


async def _collected(request: Request, limits: Limits) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body:
            raise _too_large(limits)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        f"the body is larger than the {limits.body:,} bytes that this server accepts",
        status=413,
        code="body_too_large",
        headers={"Connection": "close"},
    )


def parsed_object(raw: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object of these bytes; ApiError for anything else."""
    if raw.count(b"{") + raw.count(b"[") > limits.containers:
        raise ApiError(f"the body holds over {limits.containers:,} objects and lists")
    try:
        content: Any = json.loads(
            raw.decode("utf-8"), parse_constant=_constant, object_pairs_hook=_object, parse_float=_float
        )
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 text (byte {error.start})", code="invalid_json") from None
    except RecursionError:
        raise _too_deep(limits) from None
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}"[:500], code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(f"the body must be a JSON object, got {type(content).__name__}", code="invalid_json")
    _check(content, limits, b"\\u" in raw)
    return cast("dict[str, Any]", content)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:100]!r} occurs twice in an object")
    return found


def _too_deep(limits: Limits) -> ApiError:
    return ApiError(f"the body is nested more than {limits.depth} levels deep", code="invalid_json")


def _check(content: Any, limits: Limits, escapes: bool) -> None:
    """ApiError for a value that is nested too deeply, or that holds lone surrogates, which are no characters."""
    level: list[Any] = [content]
    for _ in range(limits.depth):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                entries = cast("dict[str, Any]", value)
                if escapes:
                    for key in entries:
                        _encodable(key)
                below += entries.values()
            elif isinstance(value, list):
                below += cast("list[Any]", value)
            elif escapes and isinstance(value, str):
                _encodable(value)
        level = [
            value for value in below if isinstance(value, dict | list) or (escapes and isinstance(value, str))
        ]
        if not level:
            return
    raise _too_deep(limits)


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError("the body has a lone surrogate, which is no character", code="invalid_json") from None
