"""The public tokenizer classes: `PreTrainedTokenizerFast` with the `TokenizerFamily` of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from monoblock.tokenization.families import GPT2, GPT_NEOX, MPNET
from monoblock.tokenization.fast import PreTrainedTokenizerFast
from monoblock.tokenization.llama import LLAMA
from monoblock.tokenization.openai_gpt import OpenAIGPTTokenizer
from monoblock.tokenization.sentencepiece import doubles_first_space


class GPTNeoXTokenizerFast(PreTrainedTokenizerFast):
    """The byte-level BPE of GPT-NeoX-20B, which MPT uses: `<|endoftext|>` is the bos, eos and unknown token.

    `add_prefix_space=True` encodes each text as if a space preceded it; `add_bos_token` and `add_eos_token` add
    `<|endoftext|>` before and after it.
    """

    family = GPT_NEOX


class GPT2Tokenizer(PreTrainedTokenizerFast):
    """The byte-level BPE of GPT-2, which GPT Neo uses: `<|endoftext|>` is bos and eos; there is no padding token.

    `add_prefix_space` and `add_bos_token` as for `GPTNeoXTokenizerFast`.
    """

    family = GPT2

    def __init__(
        self, /, vocab_file: Any = None, merges_file: Any = None, tokenizer_file: Any = None, **kwargs: Any
    ):
        super().__init__(
            vocab_file=vocab_file, merges_file=merges_file, tokenizer_file=tokenizer_file, **kwargs
        )


class LlamaTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of Llama, Mistral, Fuyu and Persimmon: SentencePiece (`tokenizer.model`) or Tekken (`tekken.json`).

    Args:
        vocab_file: the path of a `tokenizer.model` (of any version, also `.v3`) or of a `tekken.json`.
        vocab, merges: token -> id and pairs, or (piece, score) pairs alone for Unigram, instead of a file.
        add_bos_token, add_eos_token: whether `<s>` and `</s>` are added; by default `<s>` is, unless a tokenizer.json
            differs.
        add_prefix_space: whether a text is encoded as if a space preceded it; default as in the files.
        legacy: whether that space is also inserted after each special token, as in the first versions of this class.
            Applies to backends that are built from a vocabulary; a tokenizer.json specifies it.
    """

    family = LLAMA

    def __init__(self, /, vocab_file: Any = None, tokenizer_file: Any = None, **kwargs: Any):
        super().__init__(vocab_file=vocab_file, tokenizer_file=tokenizer_file, **kwargs)

    def _add(self, tokens: Sequence[str | AddedToken], special: bool = False) -> int:
        if doubles_first_space(self._tokenizer):
            tokens = [_after_normalizing(token, special) for token in tokens]
        return super()._add(tokens, special)


def _after_normalizing(token: str | AddedToken, special: bool) -> AddedToken:
    """The token, matched in the normalised text: see `sentencepiece.FIRST_SPACE`."""
    if isinstance(token, str):
        return AddedToken(token, normalized=True, special=special)
    kept: dict[str, Any] = {
        name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")
    }
    return AddedToken(token.content, normalized=True, **kept)


class MPNetTokenizer(PreTrainedTokenizerFast):
    """MPNet's lower-case WordPiece: `<s> A </s>`, and `<s> A </s></s> B </s>` for a pair; the unknown is `[UNK]`.

    Args:
        vocab_file: a `vocab.txt`, or the `dict.txt` of fairseq.
        do_lower_case, strip_accents, tokenize_chinese_chars: as BERT's; by default accents are stripped if lower-cased.
    """

    family = MPNET

    def __init__(self, /, vocab_file: Any = None, tokenizer_file: Any = None, **kwargs: Any):
        super().__init__(vocab_file=vocab_file, tokenizer_file=tokenizer_file, **kwargs)


# The slow and the fast name of a tokenizer are the same class.
GPT2TokenizerFast = GPT2Tokenizer
LlamaTokenizerFast = LlamaTokenizer
MPNetTokenizerFast = MPNetTokenizer
OpenAIGPTTokenizerFast = OpenAIGPTTokenizer

CLASSES: tuple[type[PreTrainedTokenizerFast], ...] = (
    PreTrainedTokenizerFast,
    GPTNeoXTokenizerFast,
    GPT2Tokenizer,
    LlamaTokenizer,
    MPNetTokenizer,
    OpenAIGPTTokenizer,
)


def by_name(name: str) -> type[PreTrainedTokenizerFast] | None:
    """The class of a name in `tokenizer_config.json`, slow or fast."""
    return next((cls for cls in CLASSES if name in cls.family.names), None)


def by_model_type(model_type: str) -> type[PreTrainedTokenizerFast] | None:
    """The tokenizer class of a model type."""
    return next((cls for cls in CLASSES if model_type in cls.family.model_types), None)
