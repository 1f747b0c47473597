"""The options of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from monoblock.generation.drafts import check_method
from monoblock.generation.suffix_automaton import SEGMENTS

SPECULATION_CACHE = 200_000  # tokens, some 40 MB


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits of an engine.

    `cache_memory`: bytes of the KV cache; None: a quarter of the memory that is free. `max_sequences` are computed at
    once, and `max_step_tokens` tokens in one step: a longer prompt is computed in chunks. `max_waiting` requests wait
    at most; QueueFull is raised for more. `max_model_len`: prompt and new tokens of a request at most; None: the
    model's context. `prefix_cache`: blocks of finished requests are kept for prompts that begin with the same tokens.
    `speculation`: drafts of requests that name none: "suffix", "lookup" or "off"; `speculative_tokens`: tokens of such
    a draft at most. `speculation_cache`: tokens of finished requests in which "suffix" searches for later ones; 0: each
    request's own tokens only.
    """

    cache_memory: int | None = None
    max_sequences: int = 64
    max_step_tokens: int = 256
    max_waiting: int = 1024
    max_model_len: int | None = None
    prefix_cache: bool = True
    speculation: str = "off"
    speculative_tokens: int | None = None
    speculation_cache: int = SPECULATION_CACHE

    def __post_init__(self) -> None:
        check_method(self.speculation)
        if self.speculative_tokens is not None and not 1 <= self.speculative_tokens <= 64:
            raise ValueError(f"speculative_tokens must be from 1 to 64, got {self.speculative_tokens}")
        if self.speculation_cache and self.speculation_cache < SEGMENTS:
            raise ValueError(
                f"speculation_cache must be 0 or at least {SEGMENTS}, got {self.speculation_cache}"
            )
        for name in ("max_sequences", "max_step_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
