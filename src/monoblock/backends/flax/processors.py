"""Logits processors in the form of transformers' Flax classes: `(input_ids, scores, cur_len) -> scores`."""

from __future__ import annotations

import inspect
from typing import Any


class FlaxLogitsProcessor:
    """Base class of custom processors of ids (rows, tokens), scores (rows, vocab) and the number of tokens. Any
    callable with or without the length is accepted too."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")


class FlaxLogitsProcessorList(list[Any]):
    """Processors applied in order."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: int, **kwargs: Any) -> Any:
        for processor in self:
            scores = without_length(processor, cur_len)(input_ids, scores, **kwargs)
        return scores


def without_length(processor: Any, cur_len: int | None = None) -> Any:
    """A processor as a function of ids and scores; if it takes a length, that is `cur_len`, by default the number of
    tokens of the ids."""
    if not callable(processor) or not _takes_length(processor):
        return processor

    def run(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[-1] if cur_len is None else cur_len
        return processor(input_ids, scores, length, **kwargs)

    return run


def _takes_length(processor: Any) -> bool:
    """Whether there is a third argument that is required or named `cur_len`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p for p in inspect.signature(processor).parameters.values() if p.kind in kinds]
    return len(found) > 2 and (found[2].default is inspect.Parameter.empty or found[2].name == "cur_len")
