"""The served models by name: loaded on demand, unloaded when nobody has used them for a while."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from monoblock.field_types import brief
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.kinds import ModelKind, default_name, detect
from monoblock.serving.server.models import ScoreModel, TextModel, TokenizedModel, VectorModel
from monoblock.serving.server.settings import ServerSettings
from monoblock.serving.server.threads import in_own_thread

log = logging.getLogger("monoblock")

NOUNS = {
    ModelKind.GENERATE: "generates text",
    ModelKind.EMBED: "computes vectors",
    ModelKind.CLASSIFY: "classifies texts",
}


@dataclass
class ModelEntry:
    """A served model. `source`: a folder or a name on the hub; None: the embedded demo. `adapter`: of a LoRA model.
    `extra`: nobody asked for it, so that it is loaded at its first request."""

    name: str
    source: str | None
    kind: ModelKind
    adapter: str | None = None
    extra: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    loaded: TokenizedModel | None = None
    error: str | None = None
    users: int = 0
    used: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> str:
        """loaded, loading, failed or idle."""
        if self.loaded is not None:
            return "loaded"
        return "loading" if self.lock.locked() else "failed" if self.error else "idle"


class ModelRegistry:
    """The models of a server. ValueError from the constructor for names that occur twice."""

    def __init__(self, entries: Iterable[ModelEntry], settings: ServerSettings) -> None:
        self.settings = settings
        self.entries: dict[str, ModelEntry] = {}
        for entry in entries:
            if entry.name in self.entries:
                raise ValueError(f"two models are named {entry.name!r}: give other names with --name")
            self.entries[entry.name] = entry
        self._aliases = {
            e.source: e for e in reversed([*self.entries.values()]) if e.source and not e.adapter
        }
        self.on_failure: Callable[[BaseException], None] | None = (
            None  # of an engine that can compute no more
        )
        self._loader = asyncio.Semaphore(1)  # models are read one after another
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded."""
        return any(entry.state == "loading" for entry in self.entries.values())

    def find(self, name: str | None, *kinds: ModelKind) -> ModelEntry:
        """The entry of that name, or of that folder. For None the only one, extra ones apart, or an extra one of
        `kinds` if that is of another kind. ApiError 404 if there is none."""
        if name is None:
            given = [entry for entry in self.entries.values() if not entry.extra]
            if len(given) == 1:
                extra = [entry for entry in self.entries.values() if entry.extra and entry.kind in kinds]
                return extra[0] if extra and given[0].kind not in kinds else given[0]
            raise ApiError(
                f"model is missing; the models are: {', '.join(self.entries)}",
                param="model",
                code="missing_required_parameter",
            )
        found = self.entries.get(name) or self._aliases.get(name)
        if found is None:
            raise ApiError(
                f"there is no model {brief(name)}; the models are: {', '.join(self.entries)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found

    @contextlib.asynccontextmanager
    async def use(self, name: str | None, *kinds: ModelKind) -> AsyncGenerator[Any]:
        """The loaded model of that name, which stays loaded within the block.

        ApiError: 404 if there is none, 400 if it is of another kind, 503 if it cannot be loaded.
        """
        entry = self.find(name, *kinds)
        if kinds and entry.kind not in kinds:
            wanted = " or ".join(NOUNS[kind] for kind in kinds)
            raise ApiError(
                f"the model {entry.name} {NOUNS[entry.kind]}; this endpoint needs one that {wanted}",
                param="model",
                code="model_not_supported",
            )
        entry.users += 1
        try:
            yield await self.load(entry)
        finally:
            entry.users -= 1
            entry.used = time.monotonic()

    async def load(self, entry: ModelEntry) -> TokenizedModel:
        """The loaded model; ApiError 503 if its files cannot be loaded. The next request tries again."""
        if entry.loaded is not None:
            return entry.loaded
        # A task of its own: that a client leaves does not stop the loading for others.
        task = asyncio.create_task(self._load(entry))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it is reported to those who wait, if anybody does

    async def _load(self, entry: ModelEntry) -> TokenizedModel:
        async with entry.lock:
            if entry.loaded is not None:
                return entry.loaded
            try:
                async with self._loader:
                    made = await in_own_thread(lambda: self._read(entry), f"loading {entry.name}")
                entry.loaded = self._started(entry, made)
            except Exception as error:
                entry.error = " ".join(str(error).split()) or type(error).__name__
                log.error("the model %s cannot be loaded: %s", entry.name, entry.error)
                raise ApiError(
                    f"the model {entry.name} cannot be loaded; the server's log has the reason",
                    status=503,
                    code="model_not_loaded",
                ) from error
            entry.error, entry.used = None, time.monotonic()
            return entry.loaded

    def _read(self, entry: ModelEntry) -> Any:
        """Read the files: an engine, a SentenceTransformer or a CrossEncoder. Runs in a thread."""
        loading, hub = self.settings.loading, self.settings.hub
        if entry.kind is ModelKind.GENERATE:
            from monoblock.serving.engine.loading import load_engine

            return load_engine(
                entry.source,
                options=self.settings.engine,
                name=entry.name,
                adapter=entry.adapter,
                hub=hub or None,
                tensor_parallel=self.settings.tensor_parallel,
                pipeline_parallel=self.settings.pipeline_parallel,
                **loading,
            )
        import monoblock

        make = monoblock.SentenceTransformer if entry.kind is ModelKind.EMBED else monoblock.CrossEncoder
        device = loading.get("device", "auto")
        return make(
            entry.source,
            device=None if device == "auto" else device,
            dtype=loading.get("dtype", "auto"),
            quantization_config=loading.get("quantize"),
            **hub,
        )

    def _started(self, entry: ModelEntry, made: Any) -> TokenizedModel:
        waiting = self.settings.limits.waiting
        if entry.kind is ModelKind.EMBED:
            return VectorModel(made, waiting)
        if entry.kind is ModelKind.CLASSIFY:
            return ScoreModel(made, waiting)
        from monoblock.serving.engine.async_engine import AsyncEngine

        engine = AsyncEngine(made)
        engine.start(self.on_failure)
        return TextModel(engine, self.settings.chat_template, self.settings.use_generation_config)

    async def unload_idle(self) -> None:
        """Unload the models that nobody has used for the settings' `idle_timeout`."""
        limit = self.settings.idle_timeout
        for entry in self.entries.values():
            if limit is None or entry.users or entry.loaded is None or entry.lock.locked():
                continue
            if time.monotonic() - entry.used >= limit:
                async with entry.lock:
                    model, entry.loaded = entry.loaded, None
                    await model.close(drain=True)
                del model
                import gc

                gc.collect()  # a model and its modules refer to each other
                log.info("the model %s is unloaded: nobody used it for %g s", entry.name, limit)

    async def watch(self) -> None:
        """Unload idle models until cancelled."""
        limit = self.settings.idle_timeout
        if limit is None:
            return
        while True:
            await asyncio.sleep(min(max(limit / 4, 0.05), 30))
            await self.unload_idle()

    async def close(self, *, drain: bool) -> None:
        """Close all models."""
        for entry in self.entries.values():
            model, entry.loaded = entry.loaded, None
            if model is not None:
                await model.close(drain=drain)


def entries_of(
    sources: Sequence[str | None], names: Sequence[str], adapters: Sequence[str], hub: dict[str, Any]
) -> list[ModelEntry]:
    """The entries of the command's arguments. `adapters`: NAME=PATH each.

    ValueError for names without a model, an adapter without a base model, or a model that is not served; ImportError
    for adapters without peft.
    """
    if len(names) > len(sources):
        raise ValueError(f"there are {len(names)} names for {len(sources)} models")
    entries: list[ModelEntry] = []
    for index, source in enumerate(sources):
        name = names[index] if index < len(names) else default_name(source)
        kind = ModelKind.GENERATE if source is None else detect(source, hub)
        entries.append(ModelEntry(name, source, kind))
    bases = [entry for entry in entries if entry.kind is ModelKind.GENERATE]
    if adapters and importlib.util.find_spec("peft") is None:
        raise ImportError("adapters need the package peft: pip install peft")
    for text in adapters:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"an adapter is given as NAME=PATH, got {brief(text)}")
        base = _base_of(path, bases)
        entries.append(ModelEntry(name, base.source, ModelKind.GENERATE, adapter=path))
    return entries


def _base_of(adapter: str, bases: Sequence[ModelEntry]) -> ModelEntry:
    """The only generating model, or the one that the adapter's config names."""
    if len(bases) == 1:
        return bases[0]
    from monoblock.checkpoint.adapter_files import base_of
    from monoblock.checkpoint.hub import HubOptions

    wanted = base_of(adapter, HubOptions())
    found = [entry for entry in bases if wanted in (entry.source, entry.name)]
    if not found:
        known = ", ".join(str(entry.source) for entry in bases) or "none"
        raise ValueError(f"the adapter {adapter} is for {wanted}; the generating models are: {known}")
    return found[0]
