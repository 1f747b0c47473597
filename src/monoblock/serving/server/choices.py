"""What chat and completions share: log-probabilities in OpenAI's forms, and the state of a choice."""

from __future__ import annotations

import codecs
import hashlib
import secrets
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from monoblock.serving.engine.results import TokenLogprob
from monoblock.serving.server.spelling import TokenSpelling

LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON does not have


def identifier(prefix: str) -> str:
    """A new id of an answer."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


@lru_cache(maxsize=64)
def fingerprint(model: str) -> str:
    """OpenAI's system_fingerprint: of the version and the model."""
    from monoblock import __version__

    return "fp_" + hashlib.sha256(f"{__version__} {model}".encode()).hexdigest()[:10]


def finite(value: float) -> float:
    """A log-probability that JSON can hold."""
    return value if value >= LOWEST else LOWEST


def chat_logprobs(
    found: Sequence[TokenLogprob], spelling: TokenSpelling, top: bool, as_ids: bool = False
) -> list[dict[str, Any]]:
    """The `content` of a chat choice's logprobs: each token with its bytes and its alternatives."""

    def one(token: int, value: float) -> dict[str, Any]:
        text = f"token_id:{token}" if as_ids else spelling.text(token)
        return {"token": text, "logprob": finite(value), "bytes": list(spelling.data(token))}

    return [
        {
            **one(entry.token, entry.logprob),
            "top_logprobs": [one(*pair) for pair in entry.top] if top else [],
        }
        for entry in found
    ]


def completion_logprobs(
    found: Sequence[TokenLogprob | None],
    tokens: Sequence[int],
    spelling: TokenSpelling,
    count: int,
    offset: int,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The logprobs of a completion choice. `offset`: the index of the first token's text; None in `found`: a token
    without a log-probability, the first of a prompt. The chosen token is among the alternatives."""

    def text(token: int) -> str:
        return f"token_id:{token}" if as_ids else spelling.literal(token)

    offsets: list[int] = []
    tops: list[dict[str, float] | None] = []
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    for entry, token in zip(found, tokens, strict=True):
        offsets.append(offset)
        offset += len(characters.decode(spelling.data(token)))
        if entry is None:
            tops.append(None)
            continue
        best = {text(t): finite(v) for t, v in reversed(entry.top[:count])}
        tops.append({**dict(reversed(best.items())), text(entry.token): finite(entry.logprob)})
    return {
        "text_offset": offsets,
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in found],
        "tokens": [text(token) for token in tokens],
        "top_logprobs": tops,
    }


def prompt_logprobs(
    found: Sequence[TokenLogprob | None], spelling: TokenSpelling
) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token but the first, id -> {"logprob", "decoded_token"}."""

    def entries(entry: TokenLogprob) -> dict[str, Any]:
        pairs = dict([*entry.top, (entry.token, entry.logprob)])
        return {
            str(token): {"logprob": finite(value), "decoded_token": spelling.text(token)}
            for token, value in pairs.items()
        }

    return [None if entry is None else entries(entry) for entry in found]
