"""The sampling parameters of one request, with vLLM's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from monoblock.field_types import brief
from monoblock.generation.drafts import check_method
from monoblock.seeds import checked_seed

MOST_LOGPROBS = 20  # alternatives of a token, OpenAI's limit
MOST_CHOICES = 128  # completions of one request, OpenAI's limit
MOST_STOPS = 64


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and where they end.

    `temperature=0` is greedy; then `top_k`, `top_p` and `min_p` have no effect. `max_tokens=None`: up to the model's
    context. The penalties are OpenAI's: `presence_penalty` is subtracted from the scores of tokens that were generated
    before, `frequency_penalty` once for each time; `repetition_penalty` is that of arXiv:1909.05858 and counts the
    prompt's tokens too. `logprobs`: the number of alternatives for each token, 0 for the chosen one alone; they are
    those of the model's own distribution, before any of these parameters. `best_of` sequences are generated and the
    `n` with the largest mean log-probability returned. `stop` strings end the text before their first character
    (after the last with `include_stop_str_in_output`). `speculation`: how tokens are proposed, several
    for each step: "suffix" (what followed the last ones earlier in the text or in finished requests), "lookup" (in the
    text) or "off"; None: the engine's. `speculative_tokens`: how many at most; alone: "lookup" with always so many. The
    result is the same as without. `fields`: further fields of
    `GenerationConfig`, such as `{"no_repeat_ngram_size": 3}`.

    ValueError for a value out of range.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    logits_processors: Sequence[Callable[[Any, Any], Any]] = ()
    speculation: str | None = None
    speculative_tokens: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MOST_CHOICES)
        _integer("best_of", self.best_of, self.n, MOST_CHOICES, optional=True)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, optional=True)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _integer("logprobs", self.logprobs, 0, MOST_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS, optional=True)
        _integer("speculative_tokens", self.speculative_tokens, 0, 64, optional=True)
        check_method(self.speculation)
        if self.seed is not None:
            checked_seed(self.seed)
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            values = getattr(self, name)
            listed = (values,) if isinstance(values, str) else tuple(values)
            if len(listed) > MOST_STOPS or not all(isinstance(v, kind) and v != "" for v in listed):
                raise ValueError(
                    f"{name} must be at most {MOST_STOPS} of {kind.__name__}, got {brief(values)}"
                )
            object.__setattr__(self, name, listed)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias's token", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100, 100)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0

    @property
    def sequences(self) -> int:
        """The number of sequences that are generated."""
        return self.best_of or self.n

    def replaced(self, **changes: Any) -> SamplingParams:
        """The same parameters with some changed."""
        return replace(self, **changes)


def _integer(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {brief(value)}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number from {low} to {high}, got {brief(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
