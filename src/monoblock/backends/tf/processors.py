"""Processors of scores as transformers' TF classes took them: `(ids, scores, cur_len)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from monoblock.generation.processors import LogitsProcessor, LogitsProcessorList


class TFLogitsProcessor(LogitsProcessor):
    """Base of user-made processors; any callable `(ids_bn, scores_bv, cur_len) -> scores_bv` will do as well, with
    `cur_len` or without."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: int | None = None) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say what it does to the scores")


class TFLogitsProcessorList(LogitsProcessorList):
    """Processors that are applied one after the other, with the text's length where they take it."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: int | None = None, **kwargs: Any) -> Any:
        length = input_ids.shape[1] if cur_len is None else cur_len
        for processor in self:
            more = {"cur_len": length} if takes_length(processor) else {}
            scores = processor(input_ids, scores, **more, **kwargs)
        return scores


def takes_length(processor: Any) -> bool:
    """Whether a processor is called with the text's length besides."""
    return callable(processor) and "cur_len" in inspect.signature(processor).parameters


def of_two(processor: Any) -> Callable[..., Any]:
    """A processor as a function of ids and scores."""
    if not takes_length(processor):
        return processor
    return lambda ids, scores: processor(ids, scores, cur_len=ids.shape[1])
