"""Tokenizer families: the class names, file names, defaults and backend constructors of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.json_text import MAX_JSON_BYTES
from monoblock.errors import CheckpointError
from monoblock.field_types import brief, checked, in_file
from monoblock.tokenization.backend import backend_errors


class BuiltBackend(NamedTuple):
    """A backend built from vocabulary files, and the constructor arguments that those files imply."""

    backend: Tokenizer
    defaults: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class TokenizerFamily:
    """The properties in which a tokenizer class differs from `PreTrainedTokenizerFast`.

    Attributes:
        names: the names of the class in `tokenizer_config.json`; the first is written.
        model_types: the `model_type`s of `config.json` that use this family.
        vocab_files: for folders without a tokenizer.json: sets of files in order of preference, each as constructor
            argument -> file.
        defaults: default constructor arguments, overridden by the files and the user.
        build: (vocabulary arguments, all arguments) -> backend, from the vocabulary files or their content.
        adjust: (backend, all arguments); applies the arguments to a backend that was read from a tokenizer.json.
        owns_template: bos and eos follow `add_bos_token` and `add_eos_token` even if the tokenizer.json has a
            post-processor of its own.
        options_win: `add_bos_token` and `add_eos_token` in tokenizer_config.json override the post-processor of the
            tokenizer.json, as in the transformers class at the time when the models were published.
        saved_as: the class name to write into tokenizer_config.json if other libraries' class of the first of `names`
            would not use the tokenizer.json unchanged.
    """

    names: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    vocab_files: tuple[Mapping[str, str], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model_input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    build: Callable[[Mapping[str, Any], Mapping[str, Any]], BuiltBackend] | None = None
    adjust: Callable[[Tokenizer, Mapping[str, Any]], None] | None = None
    owns_template: bool = False
    options_win: bool = False
    saved_as: str | None = None


def byte_level_bpe(
    source: Mapping[str, Any], options: Mapping[str, Any], *, normalizer: Any = None
) -> BuiltBackend:
    """Byte-level BPE from `vocab` and `merges`: each a path (`vocab.json`, `merges.txt`) or the content itself."""
    backend = Tokenizer(bpe(source, "byte-level BPE"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(options.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return BuiltBackend(backend)


def bpe(source: Mapping[str, Any], what: str, **options: Any) -> BPE:
    """The BPE model of `vocab` (or `vocab_file`) and `merges` (or `merges_file`).

    Raises:
        ValueError: one of them is missing; `what` names the tokenizer that needs them.
        CheckpointError: one is damaged, or they belong to different tokenizers.
    """
    vocab, merges = (source.get(name, source.get(f"{name}_file")) for name in ("vocab", "merges"))
    if vocab is None or merges is None:
        raise ValueError(f"{what} needs both vocab (vocab.json) and merges (merges.txt)")
    tokens, pairs = _vocab(vocab), merge_pairs(merges)
    names = [str(item) if isinstance(item, str | Path) else "those given" for item in (merges, vocab)]
    with backend_errors(
        f"the merges ({names[0]})", f"do not fit the vocabulary ({names[1]})", "take both from one model"
    ):
        return BPE(vocab=tokens, merges=pairs, **options)


def _vocab(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, str | Path):
        return dict(vocab)
    with in_file(vocab):
        return checked("vocabulary", "tokens", read_json(vocab), dict[str, int])


def merge_pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges as pairs, from a `merges.txt` or from a list of pairs or of "left right" strings."""
    if isinstance(merges, str | Path):
        lines = read_text(merges).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    pairs: list[Any] = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise CheckpointError(f"a merge is two tokens separated by a space; got {brief(' '.join(wrong[0]))}")
    return pairs


def read_text(path: str | Path) -> str:
    """The text of a vocabulary file or a template; CheckpointError for invalid UTF-8."""
    if (size := Path(path).stat().st_size) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; expected at most {MAX_JSON_BYTES:,}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a text file in UTF-8 ({error}): fetch it again") from error


def _gpt_neox(source: Mapping[str, Any], options: Mapping[str, Any]) -> BuiltBackend:
    return byte_level_bpe(source, options, normalizer=normalizers.NFC())


def _check_errors(_: Tokenizer, options: Mapping[str, Any]) -> None:
    if (errors := options.get("errors", "replace")) != "replace":
        raise ValueError(
            f"errors={errors!r} is not supported: invalid UTF-8 is always decoded as U+FFFD ('replace')"
        )


# The special tokens before and after BERT's vocabulary in MPNet's, which fairseq's dict.txt leaves out.
MPNET_BEFORE, MPNET_AFTER = ("<s>", "<pad>", "</s>", "<unk>"), ("<mask>",)


def _wordpiece_vocab(vocab: Any) -> dict[str, int]:
    """Token -> id of a vocab.txt (a token per line), of a dict.txt ("token count" per line), or as passed."""
    if not isinstance(vocab, str | Path):
        return dict(vocab)
    lines = read_text(vocab).removesuffix("\n").split("\n")
    if lines and " " in lines[0]:
        lines = [*MPNET_BEFORE, *(line.rpartition(" ")[0] for line in lines), *MPNET_AFTER]
    tokens = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    if len(tokens) < len(lines):
        raise CheckpointError(f"{vocab} has duplicate tokens: fetch it again")
    return tokens


def _mpnet(source: Mapping[str, Any], options: Mapping[str, Any]) -> BuiltBackend:
    given = source.get("vocab", source.get("vocab_file"))
    if given is None:
        raise ValueError("MPNet's tokenizer needs a vocabulary: vocab_file (vocab.txt) or vocab")
    vocab = _wordpiece_vocab(given)
    ends = [str(options[f"{name}_token"]) for name in ("sep", "cls")]
    if missing := [token for token in [*ends, str(options["unk_token"])] if token not in vocab]:
        name = given if isinstance(given, str | Path) else "the vocabulary given"
        raise CheckpointError(f"{name} lacks the special token {missing[0]!r}, so it is not one of MPNet's")
    backend = Tokenizer(WordPiece(vocab, unk_token=str(options["unk_token"])))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    sep, cls = ((token, vocab[token]) for token in ends)
    backend.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=False)
    return BuiltBackend(backend)


def _bert_text(backend: Tokenizer, options: Mapping[str, Any]) -> None:
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    asked: dict[str, Any] = {
        names[key]: value
        for key, value in options.items()
        if key in names and (value is not None or key == "strip_accents")
    }
    normalizer: Any = backend.normalizer
    if not asked or not isinstance(normalizer, normalizers.BertNormalizer):
        return
    for name in names.values():
        asked.setdefault(name, getattr(normalizer, name))
    backend.normalizer = normalizers.BertNormalizer(clean_text=normalizer.clean_text, **asked)


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

GPT2 = TokenizerFamily(
    names=("GPT2Tokenizer", "GPT2TokenizerFast"),
    model_types=("gpt2", "gpt_neo"),
    vocab_files=({"vocab_file": "vocab.json", "merges_file": "merges.txt"},),
    defaults={
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "add_prefix_space": False,
    },
    build=byte_level_bpe,
    adjust=_check_errors,
)

MPNET = TokenizerFamily(
    names=("MPNetTokenizer", "MPNetTokenizerFast"),
    model_types=("mpnet",),
    vocab_files=({"vocab_file": "vocab.txt"}, {"vocab_file": "dict.txt"}),
    defaults={
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "unk_token": "[UNK]",
        "pad_token": "<pad>",
        # The mask replaces a word, including the space before it.
        "mask_token": AddedToken("<mask>", lstrip=True, normalized=False, special=True),
    },
    build=_mpnet,
    adjust=_bert_text,
)
