"""The options of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits of an engine.

    `cache_memory`: bytes of the KV cache; None: a quarter of the memory that is free. `max_sequences` are computed at
    once, and `max_step_tokens` tokens in one step: a longer prompt is computed in chunks. `max_waiting` requests wait
    at most; QueueFull is raised for more. `max_model_len`: prompt and new tokens of a request at most; None: the
    model's context. `prefix_cache`: blocks of finished requests are kept for prompts that begin with the same tokens.
    """

    cache_memory: int | None = None
    max_sequences: int = 64
    max_step_tokens: int = 256
    max_waiting: int = 1024
    max_model_len: int | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
