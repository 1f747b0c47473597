"""Which replica has a conversation: the key of a request, and highest random weight hashing with a bounded load.

Requests that begin alike go to the replica whose prefix cache has their beginning, without a table of who had what:
each pair of a key and a replica has a fixed random weight, and the replica of the largest weight is chosen (Thaler and
Ravishankar, 1998), so that a replica which comes or goes moves its own keys only. A replica that has many more requests
than the least busy one is passed over (arXiv:1608.01350).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

BEGINNING = 1024  # characters, or numbers of token ids, of a prompt that are its key


def request_key(body: bytes) -> str | None:
    """The key of a request's JSON body; None if it has no prompt.

    Of a chat it is the model and all up to the first message of the user, so that the turns of a conversation have the
    same; of a completion the model and the prompt's first `BEGINNING` characters or token ids.
    """
    try:
        fields = json.loads(body)
        beginning = _beginning(fields) if isinstance(fields, dict) else None
        text = None if beginning is None else json.dumps([fields.get("model"), beginning])
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return None
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _beginning(fields: dict[str, Any]) -> Any:
    """What the key is made of; None if there is none."""
    if messages := fields.get("messages"):
        return _first_turn(messages)
    prompt = fields.get("prompt")
    return prompt[:BEGINNING] if prompt and isinstance(prompt, str | list) else None


def _first_turn(messages: Any) -> list[Any] | None:
    if not isinstance(messages, list):
        return None
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[: i + 1]
    return messages


def weight(key: str, replica: str) -> bytes:
    """The fixed random weight of a pair."""
    return hashlib.sha256(f"{replica} {key}".encode()).digest()


def preferred(
    key: str, replicas: Sequence[T], name: Callable[[T], str], load: Callable[[T], int], bound: int
) -> T | None:
    """The replica of a key; None if it has over `bound` more requests than the least busy one, or there is none."""
    if not replicas:
        return None
    own = max(replicas, key=lambda replica: weight(key, name(replica)))
    return own if load(own) <= min(map(load, replicas)) + bound else None
