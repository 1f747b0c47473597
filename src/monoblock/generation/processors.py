"""Logits processors: from the fields of a `GenerationConfig` to the functions of `scores.py`, in transformers' order.

First the processors of every strategy, then the user's own, then those of sampling, then normalisation. A new processor
is a pure function in `scores.py`, an entry here, and a check in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from monoblock.generation import scores as sc
from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.checks import as_ids
from monoblock.generation.config import GenerationConfig

Processor = Callable[[Array, Array], Array]


class LogitsProcessor:
    """Base of user-defined processors; any callable `(ids_bn, scores_bv) -> scores_bv` works as well."""

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__(input_ids, scores)")


class LogitsProcessorList(list[Any]):
    """Processors that are applied in order."""

    def __call__(self, input_ids: Array, scores: Array, **kwargs: Any) -> Array:
        for processor in self:
            scores = processor(input_ids, scores, **kwargs)
        return scores


@dataclass(frozen=True, kw_only=True)
class ProcessorContext:
    """Inputs of the processors besides their own fields. Lengths count the columns of `ids`."""

    ops: ArrayOps
    config: GenerationConfig
    prompt_bn: Array
    valid_bn: Array | None  # False for padding of the prompt; None: there is no padding
    prompt_length: int
    max_length: int
    copies: int = 1  # consecutive rows for each prompt
    keep: int = 1  # minimum of tokens that sampling filters keep
    # In a compiled loop `ids` is a right-aligned buffer with a fixed number of columns; these are its length and mask.
    # Lengths, and the numbers in fields, may be device scalars there.
    text_length: Any = None
    text_valid_bn: Array | None = None

    def length(self, ids_bn: Array) -> Any:
        """The number of tokens so far."""
        return ids_bn.shape[1] if self.text_length is None else self.text_length

    def valid(self, ids_bn: Array) -> Array | None:
        """The mask of `ids` that is False for padding of the prompt."""
        if self.text_valid_bn is not None or self.valid_bn is None:
            return self.text_valid_bn
        new = self.ops.mask(ids_bn.shape[0], ids_bn.shape[1] - self.prompt_length)
        return self.ops.concat([self.valid_bn, ~new])


# Makes the processor of a field from its value; None if it has no effect.
Build = Callable[[Any, ProcessorContext], Processor | None]
# A field, the value without effect, and its Build.
ProcessorEntry = tuple[str, Any, Build]


def _simple(function: Callable[..., Array]) -> Build:
    """For functions of (ops, scores, value)."""
    return lambda value, s: lambda _ids, scores: function(s.ops, scores, value)


def _limit(function: Callable[..., Array]) -> Build:
    """For filters, functions of (ops, scores, value, keep)."""
    return lambda value, s: lambda _ids, scores: function(s.ops, scores, value, s.keep)


def _real(value: Any) -> Any:
    """An int as a float, so that an array takes any size of it; a device scalar is unchanged."""
    return float(value) if isinstance(value, int) else value


def _repetition(penalty: float, s: ProcessorContext) -> Processor:
    return lambda ids, scores: sc.repetition_penalty(s.ops, scores, ids, _real(penalty), s.valid(ids))


def _prompt_repetition(penalty: float, s: ProcessorContext) -> Processor:
    factor = 1 / _real(penalty)
    return lambda _ids, scores: sc.repetition_penalty(s.ops, scores, s.prompt_bn, factor, s.valid_bn)


def _ngrams(size: int, s: ProcessorContext) -> Processor:
    return lambda ids, scores: sc.ban_ngrams(s.ops, scores, ids, size, ids, s.valid(ids))


def _prompt_ngrams(size: int, s: ProcessorContext) -> Processor:
    return lambda ids, scores: sc.ban_ngrams(s.ops, scores, ids, size, s.prompt_bn, s.valid_bn)


def _bias(value: Mapping[tuple[int, ...], float] | Sequence[Any], s: ProcessorContext) -> Processor:
    pairs: Iterable[Any] = cast(Any, value.items()) if isinstance(value, Mapping) else value
    return sc.SequenceBias(s.ops, {tuple(ids): float(bias) for ids, bias in pairs})


def _bad_words(words: Sequence[Sequence[int]], s: ProcessorContext) -> Processor | None:
    # A ban of a single eos token is dropped, as in transformers: it would make every sequence run to its limit.
    kept = {tuple(word): sc.NEVER for word in words if len(word) > 1 or word[0] not in s.config.eos_ids}
    return sc.SequenceBias(s.ops, kept) if kept else None


def _at(s: ProcessorContext, when: Callable[[Any], Any], change: Callable[[Array], Array]) -> Processor:
    """Apply `change` at the lengths for which `when` is true."""
    return lambda ids, scores: s.ops.choose(when(s.length(ids)), lambda: change(scores), lambda: scores)


def _ban_while(s: ProcessorContext, tokens: Sequence[int], when: Callable[[Any], Any]) -> Processor | None:
    """-inf for these tokens while `when(length so far)`."""
    if not tokens:
        return None
    index_k = s.ops.array(list(tokens))
    return _at(s, when, lambda scores: s.ops.fill_columns(scores, index_k, sc.NEVER))


def _force_at(s: ProcessorContext, tokens: Sequence[int], length: int) -> Processor:
    index_k = s.ops.array(list(tokens))
    return _at(s, lambda n: n == length, lambda scores: sc.only(s.ops, scores, index_k))


def _first_choice(s: ProcessorContext) -> Any:
    """The length at which the first token that is not forced is chosen."""
    start = s.prompt_length
    if s.config.forced_bos_token_id is None:
        return start
    return s.ops.choose(start <= 1, lambda: start + 1, lambda: start)


def _decay(value: tuple[int, float], s: ProcessorContext) -> Processor | None:
    if not s.config.eos_ids:
        return None
    start, factor = value[0] + s.prompt_length, float(value[1])
    index_k = s.ops.array(list(s.config.eos_ids))

    def grow(ids: Array, scores: Array) -> Array:
        past = s.length(ids) - start
        return s.ops.choose(
            past > 0,
            lambda: sc.raise_columns(s.ops, scores, index_k, sc.power(s.ops, factor, past) - 1),
            lambda: scores,
        )

    return grow


ALWAYS: tuple[ProcessorEntry, ...] = (
    ("sequence_bias", None, _bias),
    ("encoder_repetition_penalty", 1.0, _prompt_repetition),
    ("repetition_penalty", 1.0, _repetition),
    ("no_repeat_ngram_size", 0, _ngrams),
    ("encoder_no_repeat_ngram_size", 0, _prompt_ngrams),
    ("bad_words_ids", None, _bad_words),
    ("min_length", 0, lambda v, s: _ban_while(s, s.config.eos_ids, lambda n: n < v)),
    (
        "min_new_tokens",
        0,
        lambda v, s: _ban_while(s, s.config.eos_ids, lambda n: n < s.prompt_length + v),
    ),
    ("prefix_allowed_tokens_fn", None, lambda v, s: lambda i, x: sc.allowed_only(s.ops, x, i, v, s.copies)),
    ("forced_bos_token_id", None, lambda v, s: _force_at(s, [v], 1)),
    ("forced_eos_token_id", None, lambda v, s: _force_at(s, as_ids(v), s.max_length - 1)),
    ("remove_invalid_values", False, lambda _, s: lambda _i, x: sc.remove_invalid(s.ops, x)),
    ("exponential_decay_length_penalty", None, _decay),
    ("suppress_tokens", None, lambda v, s: _ban_while(s, v, lambda _: True)),
    ("begin_suppress_tokens", None, lambda v, s: _ban_while(s, v, lambda n: n == _first_choice(s))),
)
SAMPLING: tuple[ProcessorEntry, ...] = (
    ("temperature", 1.0, lambda v, _: lambda _i, x: x / _real(v)),
    ("top_h", None, _simple(sc.top_h)),
    ("top_k", 0, _limit(sc.top_k)),
    ("top_p", 1.0, _limit(sc.top_p)),
    ("min_p", None, _limit(sc.min_p)),
    ("typical_p", 1.0, _limit(sc.typical_p)),
    ("epsilon_cutoff", 0.0, _limit(sc.epsilon_cutoff)),
    ("eta_cutoff", 0.0, _limit(sc.eta_cutoff)),
)
LAST: tuple[ProcessorEntry, ...] = (
    ("renormalize_logits", False, lambda _, s: lambda _i, x: s.ops.log_softmax(x)),
)


# Processors that read the tokens so far, not only their number.
READERS = frozenset(
    {
        "sequence_bias",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
    }
)


def wanted(config: GenerationConfig, allowed: Any = None) -> dict[str, Any]:
    """The fields that change the scores of a call, and their values; `allowed`: its prefix_allowed_tokens_fn."""
    values = {**config.set_fields(), "prefix_allowed_tokens_fn": allowed}
    tables = (*ALWAYS, *(SAMPLING if config.do_sample else ()), *LAST)
    given = ((name, values.get(name), off) for name, off, _ in tables)
    return {name: value for name, value, off in given if value is not None and value != off}


def build(
    context: ProcessorContext, values: Mapping[str, Any], own: Iterable[Processor] = ()
) -> list[Processor]:
    """The processors of these fields (see `wanted`), in order; `own` are the user's."""

    def of(table: Iterable[ProcessorEntry]) -> list[Processor]:
        built = (build(values[name], context) for name, _, build in table if name in values)
        return [processor for processor in built if processor is not None]

    return [*of(ALWAYS), *(_checked(context.ops, processor) for processor in own), *of(SAMPLING), *of(LAST)]


def _checked(ops: ArrayOps, processor: Any) -> Processor:
    """The user's processor, with a check of the shape that it returns."""
    if not callable(processor):
        raise TypeError(
            f"logits_processor holds {type(processor).__name__}; expected callables (input_ids, scores) -> scores"
        )

    def run(ids: Array, scores: Array) -> Array:
        changed = processor(ops.to_framework(ids), ops.to_framework(scores))
        if getattr(changed, "shape", None) != scores.shape:
            got = (
                "nothing" if changed is None else f"shape {getattr(changed, 'shape', type(changed).__name__)}"
            )
            raise ValueError(
                f"the logits processor {type(processor).__name__} must return scores of shape "
                f"{tuple(scores.shape)}, got {got}"
            )
        return changed

    return run
