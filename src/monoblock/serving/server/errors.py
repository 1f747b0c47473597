"""Errors of the API, as OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with a status other than 200.

    `param`: the field that causes it, such as "messages[0].content". `code`: a word for programs, such as
    "model_not_found".
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        if code is None and status == 400:
            code = "invalid_value"
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """The body of the answer: {"error": {"message", "type", "param", "code"}}."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def too_busy(what: str, after: int = 1) -> ApiError:
    """429: the queue is full. `after`: seconds until the client should try again."""
    return ApiError(
        f"{what}: try again later",
        status=429,
        code="queue_full",
        headers={"Retry-After": str(after)},
    )


def timed_out(seconds: float) -> ApiError:
    """408: a request took longer than the server allows."""
    return ApiError(
        f"the request took longer than the {seconds:g} s that this server allows: ask for fewer tokens",
        status=408,
        code="request_timeout",
    )
