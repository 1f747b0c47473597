"""A small tokenizer with Fuyu's vocabulary: SentencePiece's Unigram with byte fallback, numbers as tokens."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import Unigram

WORDS = (
    "▁Generate",
    "▁a",
    "▁coco",
    "-style",
    "▁caption",
    "▁what",
    "▁is",
    "▁in",
    "▁the",
    "▁box",
    "▁cat",
    "▁dog",
)
NUMBERS = 1100  # halved coordinates of a 1080 x 1920 image reach 960


def backend() -> Tokenizer:
    """Ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`; then the bytes `<0x00>`..`<0xFF>`, numbers, letters and words."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -1.0) for byte in range(256)]
    pieces += [("|SPEAKER|", -1.0), ("|NEWLINE|", -1.0)]
    pieces += [(str(number), -6.0) for number in range(NUMBERS)]
    pieces += [(letter, -9.0) for letter in ("▁", *string.ascii_letters, *"<>/,.?!-'|_")]
    pieces += [(word, -3.0) for word in WORDS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
