"""Tekken, the byte-pair vocabulary of Mistral's newer models, from `tekken.json`.

The file holds byte strings by rank, the pattern that cuts texts, and (in newer files) the special tokens. Ids begin
with the special tokens; a byte string's id is its rank after them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from monoblock.errors import CheckpointError
from monoblock.tokenization.sentencepiece import ranked_merges

# The special tokens of files that do not list their own, by id; up to their number the rest are `<SPECIAL_{id}>`.
SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


class Tekken(NamedTuple):
    """What a `tekken.json` says: the backend, the version of its prompts ("v3"), and its special tokens by id."""

    backend: Tokenizer
    version: str
    special: list[str]


def is_tekken(path: str | Path) -> bool:
    """Whether a file's name is one of a Tekken vocabulary: `tekken.json`, `tekken_240718.json`."""
    name = Path(path).name
    return name.startswith("tekken") and name.endswith(".json")


def read_tekken(path: str | Path) -> Tekken:
    """Read a `tekken.json`.

    Raises:
        CheckpointError: the file is cut off, or lacks what a Tekken vocabulary has.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        config = content["config"]
        version = str(config.get("version"))
        special = _special(content.get("special_tokens"), int(config["default_num_special_tokens"]))
        ranked = _bytes_by_rank(content["vocab"], int(config["default_vocab_size"]) - len(special))
        splits = _pattern(config["pattern"])
        backend = Tokenizer(_bpe(ranked, special))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is not a Tekken vocabulary, or is damaged ({what}): fetch it again"
        ) from error
    # Texts are cut first; then each byte stands for a character, as in every byte-level BPE.
    cut = pre_tokenizers.Split(splits, "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    cast(Any, backend).add_special_tokens(added)
    return Tekken(backend, version, special)


def _special(listed: Any, count: int) -> list[str]:
    names = list(SPECIAL)
    if listed is not None:
        rows = sorted(cast(list[dict[str, Any]], listed), key=lambda row: int(row["rank"]))
        if [int(row["rank"]) for row in rows] != list(range(len(rows))):
            raise ValueError("the ranks of its special tokens have gaps")
        names = [str(row["token_str"]) for row in rows]
    if len(names) > count:
        raise ValueError(f"it lists {len(names)} special tokens and has room for {count}")
    return [*names, *(f"<SPECIAL_{index}>" for index in range(len(names), count))]


def _bytes_by_rank(vocab: list[dict[str, Any]], size: int) -> list[bytes]:
    if len(vocab) < size:
        raise ValueError(f"it has {len(vocab)} tokens of the {size} that its config names")
    ranked = [b""] * size
    for row in vocab:
        if (rank := int(row["rank"])) < size:
            ranked[rank] = base64.b64decode(row["token_bytes"], validate=True)
    if not all(ranked) or len(set(ranked)) < size:
        raise ValueError("ranks are missing, or tokens occur twice")
    return ranked


def _pattern(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the backend raises plain exceptions
        raise ValueError(f"its pattern is broken: {error}") from error


def _bpe(ranked: list[bytes], special: list[str]) -> BPE:
    letters = dict(enumerate(byte_letters()))
    order = {token.decode("latin-1").translate(letters): rank for rank, token in enumerate(ranked)}
    vocab = {token: index for index, token in enumerate(special)}
    for token, rank in order.items():
        if vocab.setdefault(token, len(special) + rank) != len(special) + rank:
            raise ValueError(f"{token!r} is a special token and a token of texts")
    return BPE(vocab, ranked_merges(order, order.__getitem__), ignore_merges=True)


def byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself if visible, else one above 255."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
