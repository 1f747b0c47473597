"""Tokens as text and bytes, for log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character of each byte: printable Latin-1 stands for itself, the rest follows U+0100."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


def _decoders(state: dict[str, Any]) -> Iterable[str]:
    """The types of a decoder and of the decoders inside it."""
    yield state.get("type", "")
    inner: list[dict[str, Any]] = state.get("decoders") or []
    for decoder in inner:
        yield from _decoders(decoder)


class TokenSpelling:
    """The bytes of each token of a vocabulary; those of a WordPiece token are its decoded text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = tokenizer.backend_tokenizer.decoder
        kinds: set[str] = set() if decoder is None else {*_decoders(json.loads(decoder.__getstate__()))}
        self._byte_level = "ByteLevel" in kinds
        self._fallback = "ByteFallback" in kinds
        self._pieces = bool(kinds & {"Metaspace", "Replace"})
        self._added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._known: dict[int, bytes] = {}

    def data(self, token: int) -> bytes:
        """The token's bytes; of a token that the tokenizer does not know, none."""
        if (found := self._known.get(token)) is None:
            found = self._known[token] = self._spelled(token)
        return found

    def text(self, token: int) -> str:
        """The token's text; U+FFFD where its bytes are part of a character."""
        return self.data(token).decode(errors="replace")

    def literal(self, token: int) -> str:
        """The token's text, or "bytes:\\\\xe4\\\\xbd" where that is no UTF-8, as in OpenAI's completions."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _spelled(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level:
            alphabet = byte_alphabet()
            if all(letter in alphabet for letter in piece):
                return bytes(alphabet[letter] for letter in piece)
            return piece.encode()
        if self._fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        if self._pieces:
            return piece.replace(SPACE, " ").encode()
        return self.tokenizer.decode([token]).encode()
