"""Stopping criteria, which decide for each row whether it is finished."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from monoblock.generation.arrays import Array
from monoblock.generation.checks import as_ids
from monoblock.texts import check_characters

Rows = list[list[int]]  # token ids of each row, prompt included


class StoppingCriteria:
    """Base of user-defined criteria; any callable `(input_ids, scores) -> bool or one bool for each row` will do.

    `input_ids` is an array (rows, tokens) of the framework, prompt included; `scores` the scores of all steps with
    `return_dict_in_generate=True, output_scores=True`, else None.
    """

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__(input_ids, scores)")


class HostCriteria(StoppingCriteria):
    """A criterion on token ids as Python lists, without a copy from the device."""

    def after(self, rows: Rows) -> list[bool]:
        """Whether each row is finished."""
        raise NotImplementedError

    def __call__(self, input_ids: Array, scores: Any = None, **kwargs: Any) -> list[bool]:
        del scores, kwargs  # transformers' signature
        return self.after(input_ids.tolist())


class StoppingCriteriaList(list[Any]):
    """Criteria any of which may end a row."""

    def __call__(self, input_ids: Array, scores: Any = None, **kwargs: Any) -> list[bool]:
        rows = int(input_ids.shape[0])
        verdicts = [per_row(criterion(input_ids, scores, **kwargs), rows, criterion) for criterion in self]
        return [any(verdict) for verdict in zip(*verdicts, strict=True)] if verdicts else [False] * rows

    @property
    def max_length(self) -> int | None:
        """The limit of the first `MaxLengthCriteria` here."""
        return next((c.max_length for c in self if isinstance(c, MaxLengthCriteria)), None)


def per_row(verdict: Any, rows: int, criterion: Any) -> list[bool]:
    """A criterion's result as one bool for each row; ValueError for another length."""
    plain = verdict.tolist() if hasattr(verdict, "tolist") else verdict
    if not isinstance(plain, Sequence):
        return [bool(plain)] * rows
    flat = [bool(cast(Any, v)[0] if isinstance(v, Sequence) else v) for v in cast(Sequence[Any], plain)]
    if len(flat) != rows:
        raise ValueError(
            f"the stopping criterion {type(criterion).__name__} returned {len(flat)} values; expected one bool, "
            f"or {rows}"
        )
    return flat


class MaxLengthCriteria(HostCriteria):
    """Ends rows of `max_length` tokens, prompt included."""

    def __init__(self, max_length: int):
        self.max_length = max_length

    def after(self, rows: Rows) -> list[bool]:
        return [len(row) >= self.max_length for row in rows]


class MaxTimeCriteria(HostCriteria):
    """Ends all rows `max_time` seconds after its construction, or after `initial_timestamp` (a `time.time()`)."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None):
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def after(self, rows: Rows) -> list[bool]:
        return [time.time() - self.initial_timestamp > self.max_time] * len(rows)


ENDS_ALL_ROWS = (MaxLengthCriteria, MaxTimeCriteria)  # at the same step


class EosTokenCriteria(HostCriteria):
    """Ends rows whose last token is one of `eos_token_id`."""

    def __init__(self, eos_token_id: int | Sequence[int]):
        self.eos_token_id = frozenset(as_ids(eos_token_id))

    def after(self, rows: Rows) -> list[bool]:
        return [bool(row) and row[-1] in self.eos_token_id for row in rows]


class StopStringCriteria(HostCriteria):
    """Ends rows whose last token completes one of the strings.

    The string may begin and end inside tokens, and begin in the prompt, but its last character must come from the last
    token: an earlier occurrence does not count. `tokenizer` is anything with `decode(ids)`.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]):
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        for string in self.stop_strings:
            check_characters(string, "stop_strings")
        self._decode = text_of(tokenizer)
        # Enough tokens for the longest string at one byte per token, and one more, whose leading space a tokenizer may
        # drop.
        self._tail = max(len(string.encode()) for string in self.stop_strings) + 2

    def after(self, rows: Rows) -> list[bool]:
        return [self._ends(row[-self._tail :]) for row in rows]

    def _ends(self, tail: list[int]) -> bool:
        text = self._decode(tail)
        if not any(string in text for string in self.stop_strings):
            return False
        # Before the last token an incomplete character decodes to U+FFFD, after it to another character.
        before = len(self._decode(tail[:-1]).rstrip("\ufffd"))
        return any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in self.stop_strings)


def text_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """`tokenizer.decode` with special tokens and without clean-up, for tokenizers of any library."""
    wanted = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    parameters = inspect.signature(tokenizer.decode).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {name: value for name, value in wanted.items() if takes_all or name in parameters}
    return lambda ids: tokenizer.decode(ids, **options)


def build(
    max_time: float | None, stop_strings: Any, own: Iterable[Any], tokenizer: Any
) -> list[Callable[..., Any]]:
    """The criteria of a call besides its length and eos ids, which the loop checks itself."""
    criteria: list[Callable[..., Any]] = []
    if max_time is not None:
        criteria.append(MaxTimeCriteria(max_time))
    if stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer: generate(..., tokenizer=tokenizer)")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    for criterion in own:
        if not callable(criterion):
            raise TypeError(
                f"stopping_criteria holds {type(criterion).__name__}; expected callables "
                "(input_ids, scores) -> bool or one bool for each row"
            )
        criteria.append(criterion)
    return criteria
