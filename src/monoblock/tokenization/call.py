"""Texts to ids: the tokenizer's `__call__`, `encode` and `tokenize`, with transformers' arguments and outputs."""

from __future__ import annotations

import logging
import threading
from typing import Any

from tokenizers import Encoding

from monoblock.tokenization.encoding import BatchEncoding
from monoblock.tokenization.inputs import EncodingPlan, as_batch, check_stride, encoding_plan
from monoblock.tokenization.special import SpecialTokensMixin

log = logging.getLogger("monoblock")

# argument of the call, key of the result, attribute of the backend's encoding; the default is by `model_input_names`.
FIELDS: tuple[tuple[str, str, str], ...] = (
    ("return_token_type_ids", "token_type_ids", "type_ids"),
    ("return_attention_mask", "attention_mask", "attention_mask"),
    ("return_special_tokens_mask", "special_tokens_mask", "special_tokens_mask"),
    ("return_offsets_mapping", "offset_mapping", "offsets"),
)


class EncodingMixin(SpecialTokensMixin):
    """The methods of a tokenizer that encode texts."""

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
            text, text_pair: the inputs; `text_target` (and its pair) are encoded as `labels`.
            padding: True or "longest", "max_length", False or "do_not_pad".
            truncation: True or "longest_first", "only_first", "only_second", False or "do_not_truncate".
            max_length: maximum of tokens per row; default the model's. Alone, it enables truncation.
            stride: number of tokens that each overflowing row repeats from the row before.
            pad_to_multiple_of, padding_side, return_tensors ("pt", "np", "jax", "tf"): as in transformers.
            return_...: further keys of the result; with `return_overflowing_tokens` truncated tokens form rows of
                their own, and `overflow_to_sample_mapping` gives the index of each row's text.
            split_special_tokens: encode special tokens in the text as plain text.
            tokenizer_kwargs: more of these arguments, as a dictionary.

        Returns:
            `BatchEncoding`: lists, one per text (a flat list for a single text), or arrays [texts, tokens].
        """
        if text is None and text_target is None:
            raise ValueError("there is nothing to encode: pass text, or text_target for labels")
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
        """The ids alone: `self(text, text_pair, ...)["input_ids"]`; takes the arguments of `__call__`."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text as in the vocabulary; takes the arguments of `__call__`."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Older name of `__call__` for one text."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **options: Any) -> BatchEncoding:
        """Older name of `__call__` for a list of texts or pairs."""
        return self(batch_text_or_text_pairs, **options)

    def _plan(
        self, padding: Any, truncation: Any, max_length: Any, multiple: Any, side: Any, verbose: bool
    ) -> EncodingPlan:
        plan = encoding_plan(
            padding,
            truncation,
            max_length,
            multiple=multiple,
            side=side or self.padding_side,
            model_max_length=self.model_max_length,
            verbose=verbose,
        )
        if plan.pads and self.pad_token is None:
            raise ValueError(
                "padding needs a padding token and this tokenizer has none: set tokenizer.pad_token = "
                "tokenizer.eos_token, or tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and resize the model"
            )
        if plan.pads and self.pad_token_id is None:
            raise ValueError(
                f"pad_token={self.pad_token!r} is not in the vocabulary: add it with "
                f"tokenizer.add_special_tokens({{'pad_token': {self.pad_token!r}}}) and resize the model"
            )
        return plan

    def _encode(self, text: Any, pair: Any, name: str, options: dict[str, Any]) -> BatchEncoding:
        """Encode the texts or the targets: check, run the backend, and collect the fields of the result."""
        items, batched = as_batch(text, pair, options["is_split_into_words"], name)
        plan = self._plan(
            options["padding"],
            options["truncation"],
            options["max_length"],
            options["pad_to_multiple_of"],
            options["padding_side"],
            options["verbose"],
        )
        encodings = self._run(items, plan, options)
        overflow = options["return_overflowing_tokens"]
        rows = [[first, *first.overflowing] if overflow else [first] for first in encodings]
        flat = [row for group in rows for row in group]
        data = self._fields(flat, options)
        if overflow:
            data["overflow_to_sample_mapping"] = [sample for sample, group in enumerate(rows) for _ in group]
        if plan.max_length is None and options["verbose"]:
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
        # Padding and truncation are state of the backend: no other thread may change them before this one has encoded.
        with self._lock:
            backend = self._tokenizer
            _configure_backend(backend, plan, stride, self)
            backend.encode_special_tokens = self.split_special_tokens if split is None else split
            try:
                return backend.encode_batch(
                    items, is_pretokenized=options["is_split_into_words"], add_special_tokens=special
                )
            except BaseException as error:
                # The backend raises plain Exception for invalid arguments, or panics (not a subclass of Exception).
                if type(error) is not Exception and type(error).__name__ != "PanicException":
                    raise
                raise ValueError(
                    f"the texts cannot be truncated this way: {error}; choose another truncation, max_length or stride"
                ) from error

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of special tokens that are added to a text, or to a pair."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """The maximum of tokens of one text, without special tokens."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """The maximum of tokens of a pair, without special tokens."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def _warn_of_length(self, rows: list[Encoding]) -> None:
        longest = max((len(row) for row in rows), default=0)
        if longest > self.model_max_length > 0 and not self._warned_of_length:
            self._warned_of_length = True
            log.warning(
                "a text has %d tokens, more than the %d that the tokenizer's files give as the model's maximum",
                longest,
                self.model_max_length,
            )


def _configure_backend(backend: Any, plan: EncodingPlan, stride: int, owner: EncodingMixin) -> None:
    """Set padding and truncation of the backend if they differ: setting them costs more than encoding a short text."""
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
