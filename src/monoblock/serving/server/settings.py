"""The settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monoblock.serving.engine.options import EngineOptions


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. Sizes are in bytes, times in seconds; `schema_*`: of a `response_format`."""

    body: int = 16 * 2**20
    depth: int = 64  # of the body's JSON
    containers: int = 100_000  # objects and lists of the body
    new_tokens: int | None = None
    prompts: int = 256  # of one completion request
    inputs: int = 2048  # texts of one embedding, rerank or classification request
    messages: int = 4096
    tools: int = 128
    image_bytes: int = 10 * 2**20
    image_pixels: int = 32 * 2**20
    template: int = 2**14  # characters of a request's chat template
    schema: int = 2**17  # characters
    schema_depth: int = 32
    schema_alternatives: int = 4096  # branches of anyOf, oneOf and allOf, values of enum
    schema_seconds: float = 5.0
    body_seconds: float = 60.0
    request_seconds: float = 3600.0
    in_flight: int = 4096  # requests of all kinds
    waiting: int = 1024  # requests that wait for an embedding or classification model


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server listens, whom it admits, and how models are loaded.

    `allow_files`: the folder from which `file:` URLs of images are read. `allow_fetch`: images are fetched over HTTP.
    `hosts`: names in addition to the loopback's that a browser may use for a server on a loopback address.
    `idle_timeout`: seconds without a request until a model is unloaded; None: never. `drain_timeout`: seconds that
    running requests get after SIGTERM. `chat_template`: for generating models without one. `tensor_parallel`,
    `pipeline_parallel`: processes that hold shards or stages of the model that generates text.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    allow_files: Path | None = None
    allow_fetch: bool = False
    idle_timeout: float | None = None
    drain_timeout: float = 30.0
    chat_template: str | None = None
    use_generation_config: bool = True
    preload: bool = False
    limits: Limits = field(default_factory=Limits)
    engine: EngineOptions = field(default_factory=EngineOptions)
    loading: dict[str, Any] = field(default_factory=dict[str, Any])  # dtype, quantize, device
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    hub: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")
