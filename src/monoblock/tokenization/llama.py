"""Llama's and Mistral's tokenizers: SentencePiece or Tekken, by the file that is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from monoblock.tokenization.backend import faults
from monoblock.tokenization.families import Built, TokenizerFamily, merge_pairs
from monoblock.tokenization.mistral import sentencepiece_template, tekken_template
from monoblock.tokenization.protobuf import read_model
from monoblock.tokenization.sentencepiece import from_model, from_vocab, set_up_spaces
from monoblock.tokenization.tekken import is_tekken, read_tekken

# The names under which Mistral publishes its SentencePiece files, and its byte-pair file.
FILES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tekken.json")


def _build(source: Mapping[str, Any], options: Mapping[str, Any]) -> Built:
    given = source.get("vocab", source.get("vocab_file"))
    if given is None:
        raise ValueError(
            "Llama's tokenizer needs a vocabulary: vocab_file (tokenizer.model or tekken.json) or vocab"
        )
    if not isinstance(given, str | Path):
        merges = source.get("merges")
        pairs = None if merges is None else merge_pairs(merges)
        return _with_names(from_vocab(given, pairs, str(options["unk_token"]), options), None)
    if is_tekken(given):
        tekken = read_tekken(given)
        return _with_names(tekken.backend, tekken_template(tekken.version))
    model = read_model(given)
    with faults(given):
        backend = from_model(model, options, str(given))
    return _with_names(backend, sentencepiece_template(given, model))


def _with_names(backend: Tokenizer, template: str | None) -> Built:
    """The backend, with those of the usual special tokens that it has, and the chat template."""
    defaults: dict[str, Any] = {
        f"{name}_token": token if backend.token_to_id(token) is not None else None
        for name, token in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    defaults["add_bos_token"] = defaults["bos_token"] is not None
    if backend.token_to_id("<pad>") is not None:
        defaults["pad_token"] = "<pad>"
    return Built(backend, {**defaults, "chat_template": template} if template is not None else defaults)


def _adjust(backend: Tokenizer, options: Mapping[str, Any]) -> None:
    """Put a space before texts, or none, where a tokenizer.json says otherwise than the argument."""
    wanted = options.get("add_prefix_space")
    kinds = (pre_tokenizers.Metaspace, normalizers.Prepend, normalizers.Replace, normalizers.Sequence)
    parts = [part for part in (backend.pre_tokenizer, backend.normalizer) if part is not None]
    if wanted is None or not parts or not all(isinstance(part, kinds) for part in parts):
        return
    words = repr(parts)
    if any(name in words for name in ("Precompiled", "ByteLevel", "Split")):
        return
    has = "Prepend" in words or ("Metaspace" in words and "prepend_scheme=never" not in words)
    if has != bool(wanted):
        set_up_spaces(backend, bool(wanted), legacy=bool(options.get("legacy")))


LLAMA = TokenizerFamily(
    names=("LlamaTokenizer", "LlamaTokenizerFast", "MistralCommonBackend", "MistralCommonTokenizer"),
    model_types=("mistral", "ministral", "llama", "fuyu", "persimmon"),
    vocab_files=tuple({"vocab_file": name} for name in FILES),
    defaults={
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "padding_side": "left",
    },
    build=_build,
    adjust=_adjust,
    options_win=True,
    # transformers' LlamaTokenizer makes its own components, whatever the tokenizer.json says.
    saved_as="PreTrainedTokenizerFast",
)
