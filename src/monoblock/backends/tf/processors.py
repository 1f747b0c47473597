"""Logits processors in the form of transformers' TF classes: `(ids, scores, cur_len) -> scores`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from monoblock.generation.processors import LogitsProcessor, LogitsProcessorList


class TFLogitsProcessor(LogitsProcessor):
    """Base class of custom processors; any callable `(ids_bn, scores_bv, cur_len) -> scores_bv`, with or without
    `cur_len`, is accepted too."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: int | None = None) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")


class TFLogitsProcessorList(LogitsProcessorList):
    """Processors applied in order, with the sequence length if they take it."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: int | None = None, **kwargs: Any) -> Any:
        length = input_ids.shape[1] if cur_len is None else cur_len
        for processor in self:
            length_argument = {"cur_len": length} if takes_length(processor) else {}
            scores = processor(input_ids, scores, **length_argument, **kwargs)
        return scores


def takes_length(processor: Any) -> bool:
    """Whether a processor has the argument `cur_len`."""
    return callable(processor) and "cur_len" in inspect.signature(processor).parameters


def without_length(processor: Any) -> Callable[..., Any]:
    """A processor as a function of ids and scores."""
    if not takes_length(processor):
        return processor
    return lambda ids, scores: processor(ids, scores, cur_len=ids.shape[1])
