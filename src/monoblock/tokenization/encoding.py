"""`BatchEncoding`: the ids and masks that a tokenizer returns, with the mapping of tokens to words and characters."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self, cast

from tokenizers import Encoding

from monoblock.tokenization.tensors import converter


class CharSpan(NamedTuple):
    """Characters `start` (included) to `end` (excluded) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens `start` (included) to `end` (excluded) of an encoded text."""

    start: int
    end: int


class BatchEncoding(UserDict[str, Any]):
    """`input_ids`, `attention_mask`, ... by key or as attributes.

    `encoding[i]` is the i-th `tokenizers.Encoding`; a slice returns several. The methods that take a token, a character
    or a word take the row first if there are several: `char_to_token(row, character)`.

    Args:
        data: the dictionary.
        encoding: the backend's encodings, one per row (None: the mapping methods raise).
        tensor_type: "pt", "np", "jax" or "tf" to convert the lists to arrays.
        prepend_batch_axis: wrap each value in a list of one before conversion.
        n_sequences: 1 for single texts, 2 for pairs.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: Any = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ):
        super().__init__(data)
        self._encodings: list[Any] | None = (
            [encoding] if isinstance(encoding, Encoding) else None if encoding is None else list(encoding)
        )
        self._n_sequences = n_sequences
        if n_sequences is None and self._encodings:
            self._n_sequences = self._encodings[0].n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.data[key]
        if self._encodings is not None:
            return self._encodings[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(
            f"{key!r}: expected a name such as 'input_ids', or a slice; this BatchEncoding has no encodings"
        )

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # empty during copying and unpickling
        if name in data:
            return data[name]
        raise AttributeError(
            f"BatchEncoding has no attribute or key {name!r}; it has: {', '.join(data) or 'none'}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    @property
    def encodings(self) -> list[Encoding] | None:
        """The backend's encodings, one per row, or None."""
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether the mapping methods are available."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1 for single texts, 2 for pairs, None if unknown."""
        return self._n_sequences

    def _row(self, row: int) -> Encoding:
        if not self._encodings:
            raise ValueError(
                "this BatchEncoding has no encodings: it was not made by a call of the tokenizer"
            )
        return self._encodings[row]

    def _at(self, first: int, second: int | None) -> tuple[Encoding, int]:
        """(row, index), or (index,) of the only row; a negative index counts from the end of the row."""
        row = self._row(0 if second is None else first)
        return row, first if second is None else second

    def _token_at(self, first: int, second: int | None) -> tuple[Encoding, int]:
        row, index = self._at(first, second)
        return row, index + len(row) if index < 0 else index

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as in the vocabulary."""
        return self._row(batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Per token: 0 for the first text, 1 for the second of a pair, None for special tokens and padding."""
        return self._row(batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Per token the index of its word; None for special tokens and padding."""
        return self._row(batch_index).word_ids

    def words(self, batch_index: int = 0) -> list[int | None]:
        """Older name of `word_ids`."""
        return self.word_ids(batch_index)

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The sequence of the pair (0 or 1) that a token belongs to."""
        row, index = self._token_at(batch_or_token_index, token_index)
        return row.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The index of the word that a token belongs to."""
        row, index = self._token_at(batch_or_token_index, token_index)
        return row.token_to_word(index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The character span of a token in its text; None for special tokens."""
        row, index = self._token_at(batch_or_token_index, token_index)
        span = row.token_to_chars(index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that contains a character; None where no token does."""
        row, index = self._at(batch_or_char_index, char_index)
        return row.char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that contains a character."""
        row, index = self._at(batch_or_char_index, char_index)
        return row.char_to_word(index, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word."""
        row, index = self._at(batch_or_word_index, word_index)
        span = row.word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan:
        """The character span of a word in its text."""
        row, index = self._at(batch_or_word_index, word_index)
        return CharSpan(*cast(tuple[int, int], row.word_to_chars(index, sequence_index)))

    def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> Self:
        """Replace the lists by arrays of a framework, in place; values that already are such arrays stay."""
        if tensor_type is None:
            return self
        convert = converter(tensor_type)
        for key, value in self.data.items():
            self.data[key] = convert(key, [value] if prepend_batch_axis else value)
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """Move the PyTorch tensors to a device, in place: "cpu", "cuda:0", an index or a `torch.device`."""
        if not isinstance(device, str | int) and type(device).__name__ != "device":
            raise TypeError(
                f"to() takes a device; got {device!r}. Token ids are integers and keep their dtype"
            )
        if not any(callable(getattr(value, "to", None)) for value in self.data.values()):
            raise ValueError(
                'to() moves PyTorch tensors, and there are none: tokenize with return_tensors="pt"'
            )
        for key, value in self.data.items():
            if callable(getattr(value, "to", None)):
                self.data[key] = value.to(device=device, non_blocking=non_blocking)
        return self
