"""Texts to ids: the tokenizer's call, `encode` and `tokenize`, with the hub's arguments and outputs."""

from __future__ import annotations

import logging
import threading
from typing import Any

from tokenizers import Encoding

from monoblock.tokenization.encoding import BatchEncoding
from monoblock.tokenization.inputs import EncodingPlan, as_batch, check_stride, plan
from monoblock.tokenization.special import SpecialTokens

log = logging.getLogger("monoblock")

# argument of the call -> key of the result and attribute of the backend's encoding; None: by `model_input_names`.
FIELDS: tuple[tuple[str, str, str], ...] = (
    ("return_token_type_ids", "token_type_ids", "type_ids"),
    ("return_attention_mask", "attention_mask", "attention_mask"),
    ("return_special_tokens_mask", "special_tokens_mask", "special_tokens_mask"),
    ("return_offsets_mapping", "offset_mapping", "offsets"),
)


class Encode(SpecialTokens):
    """The part of a tokenizer that turns texts into ids."""

    model_input_names: list[str]
    model_max_length: int
    padding_side: str
    truncation_side: str
    split_special_tokens: bool
    pad_token_type_id: int
    _lock: threading.RLock
    _warned_of_length: bool

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        *,
        split_special_tokens: bool | None = None,
        max_target_length: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> BatchEncoding:
        """Encode a text, a pair, a batch of either, or texts split into words (`is_split_into_words=True`).

        Args:
            text, text_pair: what to encode; `text_target` (and its pair) give `labels` beside it.
            padding: True or "longest", "max_length", False or "do_not_pad".
            truncation: True or "longest_first", "only_first", "only_second", False or "do_not_truncate".
            max_length: tokens per row at most; default the model's. Alone, it truncates.
            stride: tokens that a row of overflow repeats from the row before.
            pad_to_multiple_of, padding_side, return_tensors ("pt", "np", "jax", "tf"): as their names say.
            return_...: which further keys the result has; with `return_overflowing_tokens` what was cut makes rows
                of its own, and `overflow_to_sample_mapping` says which text each row is from.
            split_special_tokens: read special tokens in the text as plain text.
            tokenizer_kwargs: more of these arguments, as a dictionary.

        Returns:
            `BatchEncoding`: lists, one per text (a flat list for a single text), or arrays [texts, tokens].
        """
        if text is None and text_target is None:
            raise ValueError("there is nothing to encode: give text, or text_target for labels")
        options: dict[str, Any] = {
            "add_special_tokens": add_special_tokens,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "stride": stride,
            "is_split_into_words": is_split_into_words,
            "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
            "return_token_type_ids": return_token_type_ids,
            "return_attention_mask": return_attention_mask,
            "return_overflowing_tokens": return_overflowing_tokens,
            "return_special_tokens_mask": return_special_tokens_mask,
            "return_offsets_mapping": return_offsets_mapping,
            "return_length": return_length,
            "verbose": verbose,
            "split_special_tokens": split_special_tokens,
        }
        if unknown := [name for name in tokenizer_kwargs or {} if name not in options]:
            raise TypeError(f"tokenizer_kwargs has {unknown[0]!r}, which the tokenizer's call does not take")
        options.update(tokenizer_kwargs or {})
        encoded = None if text is None else self._encode(text, text_pair, "text", options)
        if text_target is None and encoded is not None:
            return encoded
        if max_target_length is not None:
            options["max_length"] = max_target_length
        target = self._encode(text_target, text_pair_target, "text_target", options)
        if encoded is None:
            return target
        encoded["labels"] = target["input_ids"]
        return encoded

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The ids alone: `self(text, text_pair, ...)["input_ids"]`, with the call's arguments."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text, as the vocabulary spells them; with the call's arguments."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """The older name of the call for one text."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **options: Any) -> BatchEncoding:
        """The older name of the call for a list of texts or pairs."""
        return self(batch_text_or_text_pairs, **options)

    def _plan(
        self, padding: Any, truncation: Any, max_length: Any, multiple: Any, side: Any, verbose: bool
    ) -> EncodingPlan:
        decided = plan(
            padding,
            truncation,
            max_length,
            multiple=multiple,
            side=side or self.padding_side,
            model_max_length=self.model_max_length,
            verbose=verbose,
        )
        if decided.pads and self.pad_token is None:
            raise ValueError(
                "padding needs a padding token and this tokenizer has none: set tokenizer.pad_token = "
                "tokenizer.eos_token, or tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and resize the model"
            )
        if decided.pads and self.pad_token_id is None:
            raise ValueError(
                f"pad_token={self.pad_token!r} is not in the vocabulary: add it with "
                f"tokenizer.add_special_tokens({{'pad_token': {self.pad_token!r}}}) and resize the model"
            )
        return decided

    def _encode(self, text: Any, pair: Any, name: str, options: dict[str, Any]) -> BatchEncoding:
        """One side (text or target) of a call: check, run the backend, and lay the rows out."""
        items, batched = as_batch(text, pair, options["is_split_into_words"], name)
        decided = self._plan(
            options["padding"],
            options["truncation"],
            options["max_length"],
            options["pad_to_multiple_of"],
            options["padding_side"],
            options["verbose"],
        )
        encodings = self._run(items, decided, options)
        overflow = options["return_overflowing_tokens"]
        rows = [[first, *first.overflowing] if overflow else [first] for first in encodings]
        flat = [row for group in rows for row in group]
        data = self._fields(flat, options)
        if overflow:
            data["overflow_to_sample_mapping"] = [sample for sample, group in enumerate(rows) for _ in group]
        if decided.max_length is None and options["verbose"]:
            self._warn_of_length(flat)
        if not batched and options["return_tensors"] is None and not overflow:
            single: dict[str, Any] = {
                key: value[0] for key, value in data.items() if isinstance(value[0], list)
            }
            return BatchEncoding({**data, **single}, flat)
        return BatchEncoding(data, flat, tensor_type=options["return_tensors"])

    def _fields(self, rows: list[Encoding], options: dict[str, Any]) -> dict[str, list[Any]]:
        data: dict[str, list[Any]] = {"input_ids": [row.ids for row in rows]}
        for argument, key, attribute in FIELDS:
            if key in self.model_input_names if options[argument] is None else options[argument]:
                data[key] = [getattr(row, attribute) for row in rows]
        if options["return_length"]:
            data["length"] = [len(row) for row in rows]
        return data

    def _run(self, items: list[Any], plan: EncodingPlan, options: dict[str, Any]) -> list[Encoding]:
        special = options["add_special_tokens"]
        stride = check_stride(options["stride"], plan, self.num_special_tokens_to_add() if special else 0)
        split = options["split_special_tokens"]
        # The plan is state of the backend: a second thread must not change it before this one has encoded.
        with self._lock:
            backend = self._tokenizer
            _set_up(backend, plan, stride, self)
            backend.encode_special_tokens = self.split_special_tokens if split is None else split
            try:
                return backend.encode_batch(
                    items, is_pretokenized=options["is_split_into_words"], add_special_tokens=special
                )
            except BaseException as error:
                # What a user can get wrong, the backend raises as plain exceptions, or panics: no class of Exception.
                if type(error) is not Exception and type(error).__name__ != "PanicException":
                    raise
                raise ValueError(
                    f"the texts cannot be cut this way: {error}; choose another truncation, max_length or stride"
                ) from error

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens the tokenizer puts around a text, or a pair."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of one text fit in the model."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens of two texts fit in the model together."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def _warn_of_length(self, rows: list[Encoding]) -> None:
        longest = max((len(row) for row in rows), default=0)
        if longest > self.model_max_length > 0 and not self._warned_of_length:
            self._warned_of_length = True
            log.warning(
                "a text has %d tokens, more than the %d that the tokenizer's files give as the model's length",
                longest,
                self.model_max_length,
            )


def _set_up(backend: Any, plan: EncodingPlan, stride: int, owner: Encode) -> None:
    """Give the backend the plan; unchanged settings are left, since setting them costs more than a short text."""
    truncation = padding = None
    if plan.truncates:
        truncation = {
            "max_length": plan.max_length,
            "stride": stride,
            "strategy": plan.truncation,
            "direction": owner.truncation_side,
        }
    if plan.pads:
        padding = {
            "length": plan.max_length if plan.padding == "max_length" else None,
            "pad_to_multiple_of": plan.multiple,
            "pad_id": owner.pad_token_id,
            "pad_token": owner.pad_token,
            "pad_type_id": owner.pad_token_type_id,
            "direction": plan.side,
        }
    if backend.truncation != truncation:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
    if backend.padding != padding:
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
