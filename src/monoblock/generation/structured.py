"""Structured output: restricts the new tokens to a JSON schema or a regular expression.

The grammars are llguidance's (a Rust library without dependencies): a matcher for each row gives the allowed next
tokens. The library is imported when a call passes `response_format`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from monoblock.field_types import brief
from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.texts import check_characters

FORMS = (
    '{"type": "json_schema", "schema": {...}}, {"type": "json_object"} or {"type": "regex", "pattern": "..."}'
)
# Without these, whitespace between two JSON tokens is unbounded.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# llguidance's form of a tokenizer takes about a second to build for a large vocabulary.
_llguidance_tokenizers: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Any]] = WeakKeyDictionary()


class Structured:
    """A processor that masks every token after which the new text could no longer match the grammar.

    Matchers are keyed by the new tokens of a row, so that rows can be reordered and evaluated twice.
    """

    def __init__(self, ops: ArrayOps, start: int, eos: Sequence[int], matcher: Callable[[int], Any]):
        self.ops, self.start, self.eos, self.matcher = ops, start, list(eos), matcher
        self.matchers: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids_bn: Array, scores_bv: Array) -> Array:
        ops, vocab = self.ops, int(scores_bv.shape[-1])
        if not self.matchers:
            self.matchers = {(): self.matcher(vocab)}
        rows: list[list[int]] = ops.to_list(ids_bn[:, self.start :])
        known = {tuple(row): self._matcher(tuple(row)) for row in rows}
        allowed_bv = np.stack([self._allowed(known[tuple(row)], vocab) for row in rows])
        self.matchers = known
        kept_bv = ops.where(ops.array(allowed_bv), scores_bv, -np.inf)
        for row, [best] in zip(rows, ops.to_list(ops.max(kept_bv)), strict=True):
            if best == -np.inf and not known[tuple(row)].is_error():
                raise ValueError(
                    "response_format leaves no token: all allowed tokens are banned by other options, such as "
                    "bad_words_ids, suppress_tokens or min_new_tokens"
                )
        return kept_bv

    def _matcher(self, text: tuple[int, ...]) -> Any:
        if text in self.matchers:
            return self.matchers[text]
        before = self.matchers[text[:-1]]
        if before.is_stopped():
            return before  # the match is complete; the eos token and padding follow
        after = before.deep_copy()
        after.consume_token(text[-1])
        return after

    def _allowed(self, matcher: Any, vocab: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if matcher.is_stopped():
            allowed = np.zeros(vocab, dtype=np.bool_)
            # A beam without any possible continuation has a matcher in the error state.
            allowed[[] if matcher.is_error() else self.eos] = True
            return allowed
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=vocab, bitorder="little").astype(np.bool_)


def build(
    ops: ArrayOps, start: int, wanted: Any, tokenizer: Any, config: GenerationConfig
) -> Structured | None:
    """The processor for a `response_format`, or None; `start` is the index of the first new token.

    ValueError for an invalid or unsupported format, schema or expression; ImportError without llguidance.
    """
    if wanted is None:
        return None
    library = _library()
    grammar = _grammar(library, wanted)
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(f"response_format cannot be used: {' '.join(str(messages[0]).split())}")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("response_format needs the model's tokenizer: generate(..., tokenizer=tokenizer)")
    if not config.eos_ids:
        raise ValueError("response_format needs an eos token: set eos_token_id")
    eos = config.eos_ids
    return Structured(
        ops, start, eos, lambda vocab: library.LLMatcher(_tokenizer(library, tokenizer, vocab, eos), grammar)
    )


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        raise ImportError(
            'response_format needs a grammar library: pip install "monoblock[structured]"'
        ) from error


def _grammar(library: Any, wanted: Any) -> str:
    """The grammar of a response format, in the short form or that of chat APIs."""
    form: Mapping[str, Any] = cast(Mapping[str, Any], wanted) if isinstance(wanted, Mapping) else {}
    kind: Any = form.get("type")
    names: dict[Any, tuple[str, ...]] = {
        "json_schema": ("schema", "json_schema"),
        "json_object": (),
        "regex": ("pattern", "regex"),
    }
    given = {name for name in form if name != "type"}
    if kind not in names or len(given) != bool(names[kind]) or not given <= set(names[kind]):
        raise ValueError(f"response_format must be {FORMS}, got {brief(wanted)}")
    if kind == "json_object":
        return library.LLMatcher.grammar_from_json_schema({"type": "object"}, COMPACT)
    value: Any = form[next(iter(given))]
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise ValueError(f"response_format's regular expression must be a string, got {value!r}")
        check_characters(value, "response_format's regular expression")
        return library.LLMatcher.grammar_from_regex(value)
    if isinstance(value, Mapping) and "schema" in value and "json_schema" in given:
        value = cast(Mapping[str, Any], value)["schema"]  # {"json_schema": {"name": ..., "schema": {...}}}
    if not isinstance(value, Mapping | str):
        raise ValueError(
            f"response_format's schema must be a dict or a JSON string, got {type(value).__name__}"
        )
    try:
        schema: Any = json.loads(value) if isinstance(value, str) else dict(cast(Mapping[str, Any], value))
    except json.JSONDecodeError as error:
        raise ValueError(f"response_format's schema is not valid JSON: {error}") from error
    return library.LLMatcher.grammar_from_json_schema(schema, COMPACT)


def _tokenizer(library: Any, tokenizer: Any, vocab: int, eos: tuple[int, ...]) -> Any:
    cached = _llguidance_tokenizers.setdefault(tokenizer, {})
    if (vocab, eos) not in cached:
        try:
            text = tokenizer.backend_tokenizer.to_str()
            cached[vocab, eos] = library.LLTokenizer(text, n_vocab=vocab, eos_token=list(eos))
        except Exception as error:  # any error of the library's Rust side for an unsupported tokenizer
            raise ValueError(
                f"response_format cannot use this tokenizer with a model of {vocab} tokens: {error}"
            ) from error
    return cached[vocab, eos]
