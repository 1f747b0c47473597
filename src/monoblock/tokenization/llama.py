"""The tokenizer of Llama and Mistral: SentencePiece or Tekken, depending on the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from monoblock.tokenization.backend import backend_errors
from monoblock.tokenization.families import BuiltBackend, TokenizerFamily, merge_pairs
from monoblock.tokenization.mistral import sentencepiece_template, tekken_template
from monoblock.tokenization.protobuf import read_model
from monoblock.tokenization.sentencepiece import from_model, from_vocab, set_up_spaces
from monoblock.tokenization.tekken import is_tekken, read_tekken

# File names of published SentencePiece and Tekken vocabularies.
FILES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tekken.json")


def _build(source: Mapping[str, Any], options: Mapping[str, Any]) -> BuiltBackend:
    given = source.get("vocab", source.get("vocab_file"))
    if given is None:
        raise ValueError(
            "Llama's tokenizer needs a vocabulary: vocab_file (tokenizer.model or tekken.json) or vocab"
        )
    if not isinstance(given, str | Path):
        merges = source.get("merges")
        pairs = None if merges is None else merge_pairs(merges)
        return _with_defaults(from_vocab(given, pairs, str(options["unk_token"]), options), None)
    if is_tekken(given):
        tekken = read_tekken(given)
        return _with_defaults(tekken.backend, tekken_template(tekken.version))
    model = read_model(given)
    with backend_errors(given):
        backend = from_model(model, options, str(given))
    return _with_defaults(backend, sentencepiece_template(given, model))


def _with_defaults(backend: Tokenizer, template: str | None) -> BuiltBackend:
    """The backend with defaults for the special tokens that it has, and the chat template."""
    defaults: dict[str, Any] = {
        f"{name}_token": token if backend.token_to_id(token) is not None else None
        for name, token in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    defaults["add_bos_token"] = defaults["bos_token"] is not None
    if backend.token_to_id("<pad>") is not None:
        defaults["pad_token"] = "<pad>"
    return BuiltBackend(
        backend, {**defaults, "chat_template": template} if template is not None else defaults
    )


def _adjust(backend: Tokenizer, options: Mapping[str, Any]) -> None:
    """Change the prefix space of a backend from a tokenizer.json if the argument differs."""
    wanted = options.get("add_prefix_space")
    kinds = (pre_tokenizers.Metaspace, normalizers.Prepend, normalizers.Replace, normalizers.Sequence)
    components = [
        component for component in (backend.pre_tokenizer, backend.normalizer) if component is not None
    ]
    if wanted is None or not components or not all(isinstance(component, kinds) for component in components):
        return
    words = repr(components)
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
    # transformers' LlamaTokenizer builds its own components and ignores those of the tokenizer.json.
    saved_as="PreTrainedTokenizerFast",
)
