"""The tokenizer in the metadata of a GGUF file, as the constructor's arguments.

`tokenizer.ggml.model` is "llama" (SentencePiece's BPE with scores and byte fallback) or "gpt2" (byte-level BPE with
merges, whose pre-tokenizer `tokenizer.ggml.pre` names). Source: llama.cpp's llama-vocab.cpp
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from monoblock.checkpoint.gguf.header import GgufHeader
from monoblock.errors import CheckpointError, UnsupportedConfig
from monoblock.field_types import brief
from monoblock.tokenization.backend import backend_errors
from monoblock.tokenization.protobuf import (
    BYTE,
    CONTROL,
    MOST_LENGTH,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
)
from monoblock.tokenization.sentencepiece import from_model

log = logging.getLogger("monoblock")

_OWNER = "tokenizer.ggml."
MODELS = ("llama", "gpt2")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizer -> its pattern, whether a word that is a token is not merged, and whether bos is added by default.
PATTERNS: Mapping[str, tuple[str, bool, bool]] = {
    "gpt-2": (_GPT2, False, False),
    "mpt": (_GPT2, False, False),
    "olmo": (_GPT2, False, False),
    "llama-bpe": (_LLAMA3, True, True),
    "tekken": (_TEKKEN, True, True),
}


def class_name(header: GgufHeader) -> str:
    """The name of the tokenizer class; UnsupportedConfig: the model of the tokenizer is not supported."""
    return "LlamaTokenizer" if _kind(header) == "llama" else "PreTrainedTokenizerFast"


def arguments(header: GgufHeader) -> dict[str, Any]:
    """The constructor's arguments; CheckpointError: an entry is missing, or they contradict each other."""
    kind = _kind(header)
    tokens, types = _tokens(header)
    if kind == "llama":
        backend, bos = _sentencepiece(header, tokens, types), True
    else:
        backend, bos = _byte_level(header, tokens, types)
    found: dict[str, Any] = {"tokenizer_object": backend}
    for name in ("bos", "eos", "unknown", "padding"):
        own = {"unknown": "unk", "padding": "pad"}.get(name, name)
        index = header.get(f"{_OWNER}{name}_token_id", int, None)
        if index is not None and index >= len(tokens):
            raise CheckpointError(
                f"{header.path}: {_OWNER}{name}_token_id={index}, but there are {len(tokens)} tokens"
            )
        found[f"{own}_token"] = None if index is None else tokens[index]
    for name, default in (("bos", bos), ("eos", False)):
        key = f"{_OWNER}add_{name}_token"
        value = header.get(key, bool, None)
        if value is None:
            log.info("%s lacks %s: as in llama.cpp, it is %s", header.path, key, default)
        found[f"add_{name}_token"] = default if value is None else value
        if found[f"add_{name}_token"] and found[f"{name}_token"] is None:
            raise CheckpointError(f"{header.path} has {key}, but no {_OWNER}{name}_token_id")
    if (template := _templates(header)) is not None:
        found["chat_template"] = template
    return found


def _kind(header: GgufHeader) -> str:
    kind = header.get(f"{_OWNER}model", str)
    if kind not in MODELS:
        raise UnsupportedConfig(
            f"{header.path}: {_OWNER}model={brief(kind)} is not supported; known are {', '.join(MODELS)}"
        )
    return kind


def _strings(header: GgufHeader, key: str) -> list[str]:
    values = header.get(key, list)
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{header.path}: {key} must hold texts")
    return cast("list[str]", values)


def _tokens(header: GgufHeader) -> tuple[list[str], list[int]]:
    """The tokens and their types."""
    tokens, types = _strings(header, f"{_OWNER}tokens"), header.get(f"{_OWNER}token_type", list)
    if len(types) != len(tokens) or not all(type(kind) is int for kind in types):
        raise CheckpointError(
            f"{header.path}: {_OWNER}token_type has {len(types)} entries; expected an integer for each of the "
            f"{len(tokens)} tokens"
        )
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{header.path}: a token occurs twice in {_OWNER}tokens")
    if wrong := next((token for token in tokens if not 0 < len(token) <= MOST_LENGTH), None):
        raise CheckpointError(f"{header.path}: a token has {len(wrong)} characters: {brief(wrong)}")
    if not tokens or "" in tokens:
        raise CheckpointError(f"{header.path}: {_OWNER}tokens is empty, or has an empty token")
    return tokens, types


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = header.get(f"{_OWNER}scores", list)
    if len(scores) != len(tokens) or not all(type(s) is float and math.isfinite(s) for s in scores):
        raise CheckpointError(
            f"{header.path}: {_OWNER}scores has {len(scores)} entries; expected a finite number for each of the "
            f"{len(tokens)} tokens"
        )
    if header.metadata.get(f"{_OWNER}precompiled_charsmap"):
        raise UnsupportedConfig(
            f"{header.path}: {_OWNER}precompiled_charsmap is not supported for this model"
        )
    unknown = header.get(f"{_OWNER}unknown_token_id", int, None)
    if unknown is None:
        unknown = next((index for index, kind in enumerate(types) if kind == UNKNOWN), None)
    if unknown is None or unknown >= len(tokens):
        raise CheckpointError(f"{header.path} has no unknown token ({_OWNER}unknown_token_id)")
    model = SentencePieceModel(
        pieces=tokens,
        scores=scores,
        types=types,
        kind="bpe",
        unk_id=unknown,
        charsmap=b"",
        dummy_prefix=header.get(f"{_OWNER}add_space_prefix", bool, True),
        strip=header.get(f"{_OWNER}remove_extra_whitespaces", bool, False),
        escape=True,
        suffix=False,
        denormalizes=False,
    )
    known = set(tokens)
    if BYTE in types and (missing := [b for b in range(256) if f"<0x{b:02X}>" not in known]):
        raise CheckpointError(f"{header.path} lacks the token <0x{missing[0]:02X}>, one of 256 for bytes")
    with backend_errors(str(header.path)):
        return from_model(model, {}, str(header.path), unused=True)


def _byte_level(header: GgufHeader, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """The backend, and whether bos is added by default."""
    pre = header.get(f"{_OWNER}pre", str)
    if pre not in PATTERNS:
        raise UnsupportedConfig(
            f"{header.path}: {_OWNER}pre={brief(pre)} is not supported; known are {', '.join(PATTERNS)}"
        )
    pattern, ignore_merges, bos = PATTERNS[pre]
    pairs: list[tuple[str, str]] = []
    for merge in _strings(header, f"{_OWNER}merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(
                f"{header.path}: {brief(merge)} in {_OWNER}merges is not two tokens and a space"
            )
        pairs.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    with backend_errors(str(header.path)):
        backend = Tokenizer(BPE(vocab, pairs, ignore_merges=ignore_merges))
    prefix = header.get(f"{_OWNER}add_space_prefix", bool, False)
    if prefix:
        raise UnsupportedConfig(
            f"{header.path}: {_OWNER}add_space_prefix=True is not supported for byte-level BPE"
        )
    if pre == "mpt":  # as in the tokenizer of MPT's models
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    whole: Any = backend
    named = {
        CONTROL: whole.add_special_tokens,
        UNKNOWN: whole.add_special_tokens,
        USER_DEFINED: whole.add_tokens,
    }
    for kind, add in named.items():
        special = kind != USER_DEFINED
        add(
            [
                AddedToken(t, special=special, normalized=False)
                for t, k in zip(tokens, types, strict=True)
                if k == kind
            ]
        )
    return backend, bos


def _templates(header: GgufHeader) -> str | dict[str, str] | None:
    """The chat template, or several by name."""
    default = header.get("tokenizer.chat_template", str, None)
    names = (
        _strings(header, "tokenizer.chat_templates") if "tokenizer.chat_templates" in header.metadata else []
    )
    named = {name: header.get(f"tokenizer.chat_template.{name}", str) for name in names}
    if not named:
        return default
    return named if default is None else {"default": default, **named}
