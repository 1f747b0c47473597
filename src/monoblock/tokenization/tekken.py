"""Tekken, the byte-pair vocabulary of Mistral's newer models, from `tekken.json`.

The file holds byte strings by rank, the pre-tokenization pattern, and (in newer files) the special tokens. Ids begin
with the special tokens; the id of a byte string is its rank plus their number.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from monoblock.checkpoint.files import read_json
from monoblock.errors import CheckpointError
from monoblock.field_types import brief, checked
from monoblock.tokenization.backend import backend_errors
from monoblock.tokenization.sentencepiece import ranked_merges

SIZES = ("default_num_special_tokens", "default_vocab_size")
# Mistral's files have 1,000 special tokens. The number of splits of a token grows with its length.
MOST_SPECIAL, MOST_LENGTH = 2**16, 512

# The special tokens of files without a list of their own, by id; the rest up to their number are `<SPECIAL_{id}>`.
SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


class Tekken(NamedTuple):
    """The content of a `tekken.json`: the backend, the version of its prompts ("v3"), and the special tokens by id."""

    backend: Tokenizer
    version: str
    special: list[str]


def is_tekken(path: str | Path) -> bool:
    """Whether a file name is that of a Tekken vocabulary: `tekken.json`, `tekken_240718.json`."""
    name = Path(path).name
    return name.startswith("tekken") and name.endswith(".json")


def read_tekken(path: str | Path) -> Tekken:
    """Read a `tekken.json`.

    Raises:
        CheckpointError: the file is truncated or incomplete.
    """
    try:
        content = read_json(path)
        config = checked("tekken", "config", content.get("config", {}), _Config)
        if missing := sorted({"pattern", *SIZES} - config.keys()):
            raise ValueError(f"its config has no {missing[0]}")
        count, size = (config[name] for name in SIZES)
        if not 0 <= count <= MOST_SPECIAL:
            raise ValueError(f"it has {count} special tokens; expected at most {MOST_SPECIAL:,}")
        special = _special(content.get("special_tokens"), count)
        ranked = _bytes_by_rank(content.get("vocab"), size - count)
        with backend_errors(path):
            splits, backend = Regex(config["pattern"]), Tokenizer(_bpe(ranked, special))
    except (ValueError, CheckpointError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is not a Tekken vocabulary, or is damaged ({what}): fetch it again"
        ) from error
    version = str(config.get("version"))
    # Texts are split first; then each byte is mapped to a character, as in every byte-level BPE.
    cut = pre_tokenizers.Split(splits, "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    cast(Any, backend).add_special_tokens(added)
    return Tekken(backend, version, special)


class _Config(TypedDict, total=False):
    """The types of the fields of a `tekken.json`'s config."""

    pattern: str
    version: str | None
    default_vocab_size: int
    default_num_special_tokens: int


class _SpecialToken(TypedDict, total=False):
    """The types of the fields of a vocabulary entry or a special token."""

    rank: int
    token_bytes: str
    token_str: str | None


def _rows(name: str, listed: Any, *fields: str) -> list[dict[str, Any]]:
    """The entries of a list, each with these fields."""
    rows = checked("tekken", name, listed, list[_SpecialToken])
    incomplete = next((row for row in rows if any(row.get(field) is None for field in fields)), None)
    if incomplete is not None:
        raise ValueError(f"an entry of its {name} lacks {' or '.join(fields)}: {brief(incomplete)}")
    return rows


def _special(listed: Any, count: int) -> list[str]:
    names = list(SPECIAL)
    if listed is not None:
        rows = sorted(_rows("special_tokens", listed, "rank", "token_str"), key=lambda row: row["rank"])
        if [row["rank"] for row in rows] != list(range(len(rows))):
            raise ValueError("the ranks of its special tokens have gaps")
        names = [row["token_str"] for row in rows]
    if len(names) > count:
        raise ValueError(f"it lists {len(names)} special tokens and has room for {count}")
    if len(set(names)) < len(names) or not all(names):
        raise ValueError("a special token is empty or occurs twice")
    return [*names, *(f"<SPECIAL_{index}>" for index in range(len(names), count))]


def _bytes_by_rank(listed: Any, size: int) -> list[bytes]:
    vocab = _rows("vocab", listed, "rank", "token_bytes")
    if not 0 < size <= len(vocab):
        raise ValueError(f"it has {len(vocab)} tokens of the {size} that its config names")
    ranked = [b""] * size
    for row in vocab:
        if 0 <= (rank := row["rank"]) < size:
            ranked[rank] = base64.b64decode(row["token_bytes"], validate=True)
    if not all(ranked) or len(set(ranked)) < size:
        raise ValueError("ranks are missing, or tokens occur twice")
    if (longest := max(map(len, ranked))) > MOST_LENGTH:
        raise ValueError(f"it has a token of {longest} bytes; expected at most {MOST_LENGTH}")
    return ranked


def _bpe(ranked: list[bytes], special: list[str]) -> BPE:
    letters = dict(enumerate(byte_letters()))
    order = {token.decode("latin-1").translate(letters): rank for rank, token in enumerate(ranked)}
    vocab = {token: index for index, token in enumerate(special)}
    for token, rank in order.items():
        if vocab.setdefault(token, len(special) + rank) != len(special) + rank:
            raise ValueError(f"{token!r} is both a special token and a text token")
    return BPE(vocab, ranked_merges(order, order.__getitem__), ignore_merges=True)


def byte_letters() -> list[str]:
    """The character for each byte in byte-level vocabularies: itself if visible, else one above 255."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
