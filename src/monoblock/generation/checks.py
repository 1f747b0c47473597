"""Valid values of the fields of a `GenerationConfig`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast


def as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, several or None, as a tuple."""
    if value is None:
        return ()
    return (int(value),) if not isinstance(value, Sequence) else tuple(int(id) for id in value)


def plain(name: str, value: Any) -> Any:
    """The value of a field; a zero-dimensional array becomes a number.

    ValueError for other arrays, whose comparisons are not booleans.
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return value
    if tuple(value.shape) == () and hasattr(value, "item"):
        return value.item()
    raise ValueError(
        f"GenerationConfig.{name} must be a plain value, got {type(value).__name__} {tuple(value.shape)}: .tolist() "
        "makes lists of numbers"
    )


Check = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MOST_TOKENS = 2**31 - 1  # positions are int32 in compiled programs
# The range of factors that keep scores finite in float32 (quotients of infinities are NaN).
LEAST, MOST = 1e-30, 1e30


def _whole(least: int, most: int | None = None) -> Check:
    words = f"an integer of at least {least}" + ("" if most is None else f" and at most {most}")
    return lambda v: _is_whole(v) and v >= least and (most is None or v <= most), words


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    def fits(value: Any) -> bool:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max
        ):
            return False
        return (low < value if open_low else low <= value) and value <= high

    edge = "more than" if open_low else "at least"
    return fits, f"a number of {edge} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")


def _all(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(fits(item) for item in cast(Sequence[Any], value))


def _is_id(value: Any) -> bool:
    return _is_whole(value) and value >= 0


_FLAG: Check = (lambda v: isinstance(v, bool), "True or False")
_IDS: Check = (lambda v: _is_whole(v) or _all(v, _is_whole), "a token id or a list of them")
_EACH_ID: Check = (
    lambda v: _is_id(v) or (_all(v, _is_id) and len(v) > 0),
    "a token id or a list of at least one",
)
_ID_LIST: Check = (lambda v: _all(v, _is_id), "a list of token ids")
_POSITIVE = _number(0, open_low=True)
_FACTOR = _number(LEAST, MOST)


def _is_bias_value(value: Any) -> bool:
    """A number, or -inf for a ban."""
    return isinstance(value, int | float) and -math.inf <= value <= MOST


def _is_bias(value: Any) -> bool:
    pairs = list(cast(Mapping[Any, Any], value).items()) if isinstance(value, Mapping) else value
    return (
        _all(pairs, lambda pair: isinstance(pair, list | tuple) and len(cast(Sequence[Any], pair)) == 2)
        and len(pairs) > 0
        and all(_all(ids, _is_id) and len(ids) > 0 and _is_bias_value(bias) for ids, bias in pairs)
    )


def _is_decay(value: Any) -> bool:
    return _all(value, lambda item: isinstance(item, int | float)) and (
        len(value) == 2 and _is_whole(value[0]) and _FACTOR[0](value[1])
    )


CHECKS: dict[str, Check] = {
    "max_length": _whole(1, MOST_TOKENS),
    "max_new_tokens": _whole(1, MOST_TOKENS),
    "min_length": _whole(0, MOST_TOKENS),
    "min_new_tokens": _whole(0, MOST_TOKENS),
    "max_time": _POSITIVE,
    "stop_strings": (
        lambda v: (isinstance(v, str) and v != "") or _all(v, lambda s: isinstance(s, str) and s != ""),
        "a string or a list of strings, none of them empty",
    ),
    "early_stopping": (lambda v: isinstance(v, bool) or v == "never", "True, False or 'never'"),
    "num_beams": _whole(1),
    "num_return_sequences": _whole(1),
    "length_penalty": _number(-100, 100),
    "guidance_scale": _number(-MOST, MOST),
    "max_cache_len": _whole(1, MOST_TOKENS),
    "prefill_chunk_size": _whole(1, MOST_TOKENS),
    "prompt_lookup_num_tokens": _whole(1),
    "max_matching_ngram_size": _whole(1, 1024),  # prompt lookup has a table for each length
    "num_assistant_tokens": _whole(1),
    "num_assistant_tokens_schedule": (
        lambda v: v in ("constant", "heuristic_transient"),
        "'constant' or 'heuristic_transient' ('heuristic' would keep its count across calls)",
    ),
    "assistant_confidence_threshold": _number(0, 1),
    "temperature": (
        _FACTOR[0],
        f"a number of at least {LEAST:g} and at most {MOST:g} for sampling; for greedy decoding set do_sample=False",
    ),
    "top_k": (_whole(0)[0], "an integer of at least 0 (0 keeps all tokens)"),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "top_h": _number(0, 1, open_low=True),
    "typical_p": _number(0, 1, open_low=True),
    "epsilon_cutoff": (lambda v: _number(0, 1)[0](v) and v < 1, "a number of at least 0 and less than 1"),
    "eta_cutoff": (lambda v: _number(0, 1)[0](v) and v < 1, "a number of at least 0 and less than 1"),
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "bad_words_ids": (
        lambda v: _all(v, lambda word: _all(word, _is_id) and len(word) > 0) and len(v) > 0,
        "a list of lists of token ids, none of them empty",
    ),
    "sequence_bias": (_is_bias, "{(id, ...): bias} or [[[id, ...], bias], ...] with at least one entry"),
    "exponential_decay_length_penalty": (_is_decay, "(start, factor): an integer, and a number above 0"),
    "forced_bos_token_id": (_is_id, "a token id"),
    "forced_eos_token_id": _EACH_ID,
    "suppress_tokens": _ID_LIST,
    "begin_suppress_tokens": _ID_LIST,
    "eos_token_id": _IDS,
    "pad_token_id": (_is_whole, "a token id"),
    "bos_token_id": (_is_whole, "a token id"),
    **dict.fromkeys(
        (
            "do_sample",
            "use_cache",
            "renormalize_logits",
            "remove_invalid_values",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "output_logits",
            "return_dict_in_generate",
        ),
        _FLAG,
    ),
}

# Fields that have an effect only with do_sample=True.
SAMPLING_FIELDS = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)
