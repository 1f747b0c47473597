"""Reads SentencePiece's `tokenizer.model`: the fields of its protocol buffer that an encoder needs.

The format: a message is a sequence of fields, each a field number and a wire type in one varint, then the value;
numbers and types are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from monoblock.errors import CheckpointError
from monoblock.tokenization import charsmap as table

# The types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# The largest vocabularies have 256,000 pieces and 5 MB. SentencePiece learns no piece of over 512 characters; the cost
# of merges, tries and patterns grows with the square of the lengths.
MOST_BYTES, MOST_FIELDS, MOST_LENGTH = 64 * 2**20, 2**20, 512


class _InvalidMessage(Exception):
    """The bytes are not a valid message."""


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The content of a `tokenizer.model`.

    Attributes:
        pieces, scores, types: one per id; a type is one of `NORMAL`, `UNKNOWN`, ....
        kind: "unigram", "bpe", "word" or "char".
        charsmap: the normaliser's precompiled charsmap; empty for none.
        dummy_prefix: whether a space is inserted before each text.
        strip: whether leading, trailing and repeated spaces are removed.
        escape: whether spaces are written as "▁".
        suffix: whether spaces belong to the word before them.
        denormalizes: whether decoded text is changed by a charsmap of its own.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    kind: str
    unk_id: int
    charsmap: bytes
    dummy_prefix: bool
    strip: bool
    escape: bool
    suffix: bool
    denormalizes: bool

    def of_type(self, *kinds: int) -> list[int]:
        """The ids of the pieces of these types."""
        return [index for index, kind in enumerate(self.types) if kind in kinds]


def read_model(path: str | Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        CheckpointError: the file is empty, truncated, or not a SentencePiece model.
    """
    if (size := Path(path).stat().st_size) > MOST_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; a SentencePiece model has at most {MOST_BYTES:,}")
    data = Path(path).read_bytes()
    try:
        model = _model(data)
    except (_InvalidMessage, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a SentencePiece model, or is damaged ({error}): fetch it again"
        ) from error
    if not model.pieces:
        raise CheckpointError(f"{path} has no vocabulary: it is empty or not a SentencePiece model")
    return model


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    specs: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number != 1 or not isinstance(value, bytes):
            specs |= {number: value} if number in (2, 3, 5) else {}
            continue
        piece, score, kind = _piece(value)
        if not 0 < len(piece) <= MOST_LENGTH or not math.isfinite(score):
            raise _InvalidMessage(f"a piece has {len(piece)} characters and the score {score}")
        pieces.append(piece)
        scores.append(score)
        types.append(kind)
    if len(set(pieces)) < len(pieces):
        raise _InvalidMessage("a piece occurs twice")
    trainer = _select(specs.get(2, b""), (3, 24, 40))
    normalizer = _select(specs.get(3, b""), (2, 3, 4, 5))
    denormalizer = _select(specs.get(5, b""), (2,))
    charsmap = normalizer.get(2, b"")
    if charsmap and (first_error := table.first_error(_bytes(charsmap))) is not None:
        raise _InvalidMessage(f"its charsmap: {first_error}")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        kind=MODEL_TYPES.get(_number(trainer.get(3, 1)), "unknown"),
        unk_id=_number(trainer.get(40, 0)),
        charsmap=_bytes(charsmap),
        dummy_prefix=bool(normalizer.get(3, 1)),
        strip=bool(normalizer.get(4, 1)),
        escape=bool(normalizer.get(5, 1)),
        suffix=bool(trainer.get(24, 0)),
        denormalizes=bool(denormalizer.get(2)),
    )


def _select(data: int | bytes, numbers: Collection[int]) -> dict[int, int | bytes]:
    """The fields of a message with these numbers; of repeated ones the last."""
    return {number: value for number, value in _fields(_bytes(data)) if number in numbers}


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _InvalidMessage("a message is stored as a number")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _InvalidMessage("a number is stored as text")
    return value


def _piece(data: bytes) -> tuple[str, float, int]:
    """A vocabulary entry: its string, its score and its type."""
    # Nearly all have field 1 (string), field 2 (32 bits), and field 3 (one byte) unless the piece is normal.
    if len(data) > 1 and data[0] == 0x0A and data[1] < 0x80:
        end = 2 + data[1]
        rest = data[end:]
        if len(rest) in (5, 7) and rest[0] == 0x15 and (len(rest) == 5 or rest[5] == 0x18):
            kind = NORMAL if len(rest) == 5 else rest[6]
            return data[2:end].decode("utf-8"), struct.unpack_from("<f", rest, 1)[0], kind
    fields = _select(data, (1, 2, 3))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise _InvalidMessage("a vocabulary entry has fields of the wrong type")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], _number(fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: (number, value); varints as integers, all others as bytes."""
    offset = count = 0
    while offset < len(data):
        count += 1
        if count > MOST_FIELDS:
            raise _InvalidMessage(f"it has over {MOST_FIELDS:,} fields")
        tag, offset = _varint(data, offset)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            # Negative numbers are encoded in 64 bits.
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            size, offset = _varint(data, offset)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _InvalidMessage(f"there is no field of wire type {wire}")
        if size > len(data) - offset:
            raise _InvalidMessage(f"it ends {size - (len(data) - offset)} bytes too early")
        yield number, data[offset : offset + size]
        offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """An unsigned integer of up to 64 bits, and the offset after it."""
    value = shift = 0
    while offset < len(data) and shift < 70:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, offset
        shift += 7
    raise _InvalidMessage("a number has no end")
