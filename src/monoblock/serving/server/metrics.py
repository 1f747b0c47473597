"""Prometheus' metrics of a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from monoblock.serving.server.models import EncodingModel, TextModel
from monoblock.serving.server.registry import ModelRegistry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # seconds
EACH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class EngineCollector(Collector):
    """Reads the engines' counters when the metrics are requested."""

    gauges = (
        ("running", "requests_running", "Sequences that are being computed"),
        ("waiting", "requests_waiting", "Requests that wait"),
        ("cache_blocks", "cache_blocks", "Blocks of the KV cache"),
        ("cache_used", "cache_blocks_used", "Blocks of the KV cache that are in use"),
    )
    counters = (
        (
            "prefix_query_tokens",
            "prefix_cache_queries",
            "Prompt tokens that were looked up in the prefix cache",
        ),
        ("prefix_hit_tokens", "prefix_cache_hits", "Prompt tokens that the prefix cache had"),
        ("preemptions", "preemptions", "Sequences that were stopped for lack of cache, and computed again"),
        ("steps", "engine_steps", "Steps of the engine"),
        ("draft_tokens", "draft_tokens", "Draft tokens that were verified"),
        ("accepted_tokens", "accepted_tokens", "Draft tokens that were accepted"),
    )

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models

    def collect(self) -> Iterator[Any]:
        """The values of each loaded model, with the label `model`."""
        stats: dict[str, Any] = {}
        queues: dict[str, tuple[int, int]] = {}
        for name, entry in self._models.entries.items():
            if isinstance(entry.loaded, TextModel):
                stats[name] = entry.loaded.engine.stats()
            elif isinstance(entry.loaded, EncodingModel):
                queues[name] = (entry.loaded.batcher.running, entry.loaded.batcher.waiting)
        for kind, rows in ((GaugeMetricFamily, self.gauges), (CounterMetricFamily, self.counters)):
            for attribute, name, about in rows:
                family = kind(f"monoblock_{name}", about, labels=["model"])
                for model, values in stats.items():
                    family.add_metric([model], getattr(values, attribute))
                if attribute in ("running", "waiting"):
                    for model, pair in queues.items():
                        family.add_metric([model], pair[attribute == "waiting"])
                yield family


class ServerMetrics:
    """The metrics of a server, in a registry of their own."""

    def __init__(self, models: ModelRegistry) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(models))
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("monoblock_requests", "Answered requests", ["endpoint", "status"], **common)
        self.cancelled = Counter(
            "monoblock_requests_cancelled", "Requests whose client left", ["endpoint"], **common
        )
        self.in_flight = Gauge("monoblock_requests_in_flight", "Requests that run", **common)
        self.prompt_tokens = Counter("monoblock_prompt_tokens", "Tokens of prompts", ["model"], **common)
        self.new_tokens = Counter("monoblock_generation_tokens", "Generated tokens", ["model"], **common)
        self.first_token = Histogram(
            "monoblock_time_to_first_token_seconds", "From the request to its first token", ["model"],
            buckets=FIRST, **common,
        )  # fmt: skip
        self.each_token = Histogram(
            "monoblock_time_per_output_token_seconds", "Mean time of a request's further tokens", ["model"],
            buckets=EACH, **common,
        )  # fmt: skip
        self.duration = Histogram(
            "monoblock_request_duration_seconds", "From the request to the end of its answer", ["endpoint"],
            buckets=WHOLE, **common,
        )  # fmt: skip

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
