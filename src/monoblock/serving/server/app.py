"""The application: routes, pages and the state of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from monoblock.serving import page
from monoblock.serving.attention_view import ATTENTION, attention
from monoblock.serving.server import docs_page, metrics
from monoblock.serving.server.answers import error_answer, json_answer
from monoblock.serving.server.chat import chat_completions
from monoblock.serving.server.completions import completions
from monoblock.serving.server.endpoints import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    RERANK,
    RESPONSES,
    TOKENIZE,
)
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.fields import Endpoint
from monoblock.serving.server.guard import RequestGuard, as_api_error
from monoblock.serving.server.metrics import ServerMetrics
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.registry import ModelEntry, ModelRegistry
from monoblock.serving.server.responses import responses
from monoblock.serving.server.service import ServerState, state_of
from monoblock.serving.server.settings import ServerSettings
from monoblock.serving.server.threads import cancelled, in_thread
from monoblock.serving.server.tokens import detokenize, tokenize
from monoblock.serving.server.vectors import classify, embeddings, rerank

Handler = Callable[[Request], Any]

POSTS: tuple[tuple[Endpoint, Handler], ...] = (
    (CHAT, chat_completions),
    (COMPLETIONS, completions),
    (RESPONSES, responses),
    (EMBEDDINGS, embeddings),
    (RERANK, rerank),
    (CLASSIFY, classify),
    (TOKENIZE, tokenize),
    (DETOKENIZE, detokenize),
    (ATTENTION, attention),
)
DOCUMENTED = tuple(endpoint for endpoint, _ in POSTS)
# Other names under which clients look for an endpoint.
ALIASES = {"/v1/rerank": ("/rerank", "/v2/rerank"), "/classify": ("/v1/classify",)}


class ServerApp:
    """An ASGI application with its state."""

    def __init__(self, entries: Iterable[ModelEntry], settings: ServerSettings | None = None) -> None:
        settings = settings or ServerSettings()
        registry = ModelRegistry(entries, settings)
        self.state = ServerState(settings, registry, ServerMetrics(registry))
        self.api = FastAPI(title="monoblock", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self.api.state.server = self.state
        self._add_routes()
        paths = frozenset(getattr(route, "path", "") for route in self.api.routes)
        self.guard = RequestGuard(self.api, self.state, paths)
        self._entry: Any = self.guard
        if settings.cors_origins:  # outermost, so that pages of these origins can read errors too
            self._entry = CORSMiddleware(
                self.guard,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        self.failed: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None
        registry.on_failure = self._fail

    def _fail(self, error: BaseException) -> None:
        """An engine can compute no more: new requests get 503, and the server ends."""
        self.failed = error
        self.state.draining = True
        if self.on_failure is not None:
            self.on_failure()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._entry(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None]:
        """Load what is wanted from the start in the background; at the end, close all models."""
        registry = self.state.registry
        watch = asyncio.create_task(registry.watch())
        try:
            yield
        finally:
            await cancelled(watch)
            await registry.close(drain=False)

    def _add_routes(self) -> None:
        api = self.api
        for endpoint, handler in POSTS:
            shown = {"requestBody": _request_body(endpoint)}
            for path in (endpoint.path, *ALIASES.get(endpoint.path, ())):
                api.add_api_route(
                    path,
                    handler,
                    methods=["POST"],
                    summary=endpoint.about,
                    openapi_extra=shown,
                    include_in_schema=path == endpoint.path,
                    response_class=Response,
                )
        for path, handler in (
            ("/v1/models", list_models),
            ("/v1/models/{name:path}", one_model),
            ("/health", health),
            ("/metrics", show_metrics),
        ):
            api.add_api_route(path, handler, methods=["GET"], response_class=Response)
        api.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
        text = docs_page.docs_html(DOCUMENTED)

        async def docs() -> Response:
            return HTMLResponse(text, headers={"Content-Security-Policy": docs_page.POLICY})

        api.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
        _add_page(api)
        api.add_exception_handler(ApiError, _api_error)
        api.add_exception_handler(HTTPException, _http_error)
        api.add_exception_handler(Exception, _other_error)
        schema = api.openapi

        def openapi() -> dict[str, Any]:
            found = schema()
            _add_schemas(found)
            return found

        api.openapi = openapi  # type: ignore[method-assign]


def _add_page(api: FastAPI) -> None:
    """The page at /, with its files below /page/."""

    async def root() -> Response:
        return _page_answer(page.INDEX)

    async def file(name: str) -> Response:
        return _page_answer(name)

    api.add_api_route("/", root, methods=["GET"], include_in_schema=False)
    api.add_api_route("/page/{name}", file, methods=["GET"], include_in_schema=False)


def _page_answer(name: str) -> Response:
    try:
        found = page.page_file(name)
    except KeyError:
        raise ApiError("there is no such page", status=404, code="not_found") from None
    return Response(found.content, media_type=found.type, headers=page.SECURITY)


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error_answer(error)


async def _other_error(request: Request, error: Exception) -> Response:
    """A bug; the guard logs it."""
    del request
    return error_answer(as_api_error(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    words = {
        404: f"there is no endpoint {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return error_answer(
        ApiError(
            words.get(error.status_code, str(error.detail)),
            status=error.status_code,
            code=code,
            headers=error.headers,
        )
    )


# ---------------------------------------------------------------------------- OpenAPI


def _request_body(endpoint: Endpoint) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{endpoint.title}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _add_schemas(document: dict[str, Any]) -> None:
    """The schemas of all bodies."""
    _, found = models_json_schema(
        [(endpoint.model, "validation") for endpoint in DOCUMENTED],
        ref_template="#/components/schemas/{model}",
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(found["$defs"])


# ---------------------------------------------------------------------------- GET


async def list_models(request: Request) -> Response:
    """The models of the server."""
    entries = state_of(request).registry.entries.values()
    return json_answer({"object": "list", "data": [_described(entry) for entry in entries]})


async def one_model(request: Request, name: str) -> Response:
    """A model by name."""
    return json_answer(_described(state_of(request).registry.find(name)))


def _described(entry: ModelEntry) -> dict[str, Any]:
    loaded = entry.loaded
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "monoblock",
        "kind": entry.kind.value,
        "state": entry.state,
        "max_model_len": None if loaded is None else loaded.max_length,
        # Whether it has one: the page continues plain text without; null before it is loaded.
        "chat_template": loaded.template is not None if isinstance(loaded, TextModel) else None,
        "adapter": entry.adapter is not None,
    }


async def health(request: Request) -> Response:
    """200 if requests are answered at once; 503 while the first model loads, or the server stops."""
    state = state_of(request)
    if state.draining:
        return json_answer({"status": "stopping"}, 503)
    if state.registry.loading and not any(e.loaded for e in state.registry.entries.values()):
        return json_answer({"status": "loading"}, 503)
    return json_answer({"status": "ok"})


async def show_metrics(request: Request) -> Response:
    """Prometheus' metrics."""
    text = await in_thread(state_of(request).metrics.text)
    return Response(text, media_type=metrics.CONTENT_TYPE)
