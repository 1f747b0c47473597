"""What all handlers share: the models, the settings, the metrics, and the requests that run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from monoblock.serving.server.body import read_body
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.fields import Endpoint
from monoblock.serving.server.metrics import ServerMetrics
from monoblock.serving.server.registry import ModelRegistry
from monoblock.serving.server.settings import ServerSettings


@dataclass
class ServerState:
    """The state of a server: `request.app.state.server` in every handler."""

    settings: ServerSettings
    registry: ModelRegistry
    metrics: ServerMetrics
    draining: bool = False
    running: int = 0  # requests other than those for health and metrics
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, request: Request, endpoint: Endpoint) -> Any:
        """The checked values of a request's body."""
        return endpoint.read(await read_body(request, self.settings.limits))

    def drained(self) -> bool:
        """Whether no request runs."""
        return self.running == 0


def state_of(request: Request) -> ServerState:
    """The server's state."""
    return request.app.state.server


def check_count(values: Any, most: int, param: str) -> None:
    """ApiError for more values than the server allows."""
    if len(values) > most:
        raise ApiError(
            f"{param} has {len(values):,} entries; this server allows {most:,}",
            param=param,
            code="invalid_value",
        )
