"""The families of tokenizers, as data: their names in files, their defaults, and how a backend is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from monoblock.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class TokenizerFamily:
    """What distinguishes a tokenizer class from `PreTrainedTokenizerFast`.

    Attributes:
        names: the names of the class in `tokenizer_config.json`; the first is written.
        model_types: the `model_type`s of `config.json` that mean this family.
        vocab_files: for folders without a tokenizer.json: sets of files to look for in turn, each as constructor
            argument -> file.
        defaults: constructor arguments where neither the files nor the user say otherwise.
        build: (vocabulary arguments, all arguments) -> backend, from the vocabulary files or their content.
        owns_template: bos and eos are written as `add_bos_token` and `add_eos_token` say, also where the
            tokenizer.json has a template of its own.
    """

    names: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    vocab_files: tuple[Mapping[str, str], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model_input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    build: Callable[[Mapping[str, Any], Mapping[str, Any]], Tokenizer] | None = None
    owns_template: bool = False


def byte_level_bpe(
    source: Mapping[str, Any], options: Mapping[str, Any], *, normalizer: Any = None
) -> Tokenizer:
    """Byte-level BPE from `vocab` and `merges`: each a path (`vocab.json`, `merges.txt`) or the content itself."""
    vocab, merges = (source.get(name, source.get(f"{name}_file")) for name in ("vocab", "merges"))
    if vocab is None or merges is None:
        raise ValueError("byte-level BPE needs both vocab (vocab.json) and merges (merges.txt)")
    backend = Tokenizer(BPE(vocab=_vocab(vocab), merges=_merges(merges)))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(options.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return backend


def _vocab(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, str | Path):
        return dict(vocab)
    try:
        return json.loads(Path(vocab).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{vocab} is not valid JSON ({error}): fetch it again") from error


def _merges(merges: Any) -> list[tuple[str, str]]:
    if isinstance(merges, str | Path):
        lines = Path(merges).read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    pairs: list[Any] = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise CheckpointError(f"a merge is two tokens with a space between; got {' '.join(wrong[0])!r}")
    return pairs


def _gpt_neox(source: Mapping[str, Any], options: Mapping[str, Any]) -> Tokenizer:
    return byte_level_bpe(source, options, normalizer=normalizers.NFC())


GENERIC = TokenizerFamily(names=("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend"))

GPT_NEOX = TokenizerFamily(
    names=("GPTNeoXTokenizer", "GPTNeoXTokenizerFast"),
    model_types=("gpt_neox", "mpt"),
    vocab_files=({"vocab_file": "vocab.json", "merges_file": "merges.txt"},),
    defaults={
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
        "add_prefix_space": False,
    },
    build=_gpt_neox,
    owns_template=True,
)
