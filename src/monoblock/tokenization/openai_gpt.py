"""GPT-1's tokenizer: lower-case BPE whose words end in `</w>`, after one of two pre-tokenizations.

The paper's repairs the text with ftfy and splits it with spaCy; it keeps accents, and line breaks as `\n</w>`. The
other is BERT's, which removes accents and line breaks. Their ids differ.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

from tokenizers import Encoding, Tokenizer, decoders, normalizers, pre_tokenizers

from monoblock.tokenization.encoding import BatchEncoding
from monoblock.tokenization.families import BuiltBackend, TokenizerFamily, bpe
from monoblock.tokenization.fast import PreTrainedTokenizerFast
from monoblock.tokenization.inputs import EncodingPlan

log = logging.getLogger("monoblock")

# The paper's text clean-up after ftfy: some characters replaced by ASCII, spaces around runs of punctuation, and
# whitespace collapsed to one space or line break.
_PLAINER = str.maketrans(dict.fromkeys("\u2013\u2014\u2015", "-") | {"\u2026": "...", "\u00b4": "'"})
_RUNS = re.compile(r"(-+|~+|!+|\"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)")
_BREAK = re.compile(r"\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")


def standardized(text: str) -> str:
    """The paper's text clean-up."""
    text = _RUNS.sub(r" \1 ", text.translate(_PLAINER))
    return _SPACES.sub(" ", _BREAK.sub(" \n ", text)).strip()


def _has_packages() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("ftfy", "spacy"))


@lru_cache(maxsize=1)
def _packages() -> tuple[Callable[[str], str], Callable[[str], Any]]:
    """ftfy's `fix_text`, and spaCy's English tokenizer."""
    try:
        ftfy, english = (importlib.import_module(name) for name in ("ftfy", "spacy.lang.en"))
    except ImportError as error:
        raise ImportError(
            f"original=True needs {error.name}, which is not installed: pip install ftfy spacy"
        ) from error
    return ftfy.fix_text, english.English().tokenizer


@lru_cache(maxsize=2)
def _log_choice(original: bool) -> None:
    way = (
        "as in the paper (with ftfy and spaCy)"
        if original
        else "as BERT does, as ftfy or spaCy is not installed"
    )
    log.warning(
        "OpenAIGPTTokenizer splits words %s; ids differ between the two: original=%s fixes the choice",
        way,
        original,
    )


def _build(source: Mapping[str, Any], options: Mapping[str, Any]) -> BuiltBackend:
    unk = str(options["unk_token"])
    model = bpe(source, "OpenAI GPT's tokenizer", unk_token=unk, end_of_word_suffix="</w>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return BuiltBackend(backend)


OPENAI_GPT = TokenizerFamily(
    names=("OpenAIGPTTokenizer", "OpenAIGPTTokenizerFast"),
    model_types=("openai-gpt",),
    vocab_files=({"vocab_file": "vocab.json", "merges_file": "merges.txt"},),
    defaults={"unk_token": "<unk>"},
    build=_build,
)


class OpenAIGPTTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of GPT-1: lower-case BPE, whose words end in `</w>`.

    Args:
        original: True splits words as in the paper, with ftfy and spaCy, which must be installed; False as BERT does;
            None (default) as in the paper if both are installed. The choice is logged once. Offsets need False.
    """

    family = OPENAI_GPT

    def __init__(
        self,
        /,
        vocab_file: Any = None,
        merges_file: Any = None,
        tokenizer_file: Any = None,
        unk_token: Any = "<unk>",
        **kwargs: Any,
    ):
        files = {"vocab_file": vocab_file, "merges_file": merges_file, "tokenizer_file": tokenizer_file}
        super().__init__(**files, unk_token=unk_token, **kwargs)
        asked = self.init_kwargs.get("original")
        self._original = _has_packages() if asked is None else bool(asked)
        if self._original:
            _packages()
        if asked is None:
            _log_choice(self._original)

    @property
    def do_lower_case(self) -> bool:
        """Always true."""
        return True

    @property
    def original(self) -> bool:
        """Whether words are split as in the paper."""
        return self._original

    def _encode(self, text: Any, pair: Any, name: str, options: dict[str, Any]) -> BatchEncoding:
        if self._original and options["return_offsets_mapping"]:
            raise ValueError(
                "return_offsets_mapping=True needs original=False: ftfy changes the text, so tokens have no offsets in "
                "it"
            )
        return super()._encode(text, pair, name, options)

    def _run(self, items: list[Any], plan: EncodingPlan, options: dict[str, Any]) -> list[Encoding]:
        if not self._original:
            return super()._run(items, plan, options)
        split = options["split_special_tokens"]
        known = () if (self.split_special_tokens if split is None else split) else self.added_tokens_encoder
        words = [self._item(item, options["is_split_into_words"], tuple(known)) for item in items]
        with self._lock:  # the words are split already: disable the backend's own pre-tokenization
            backend: Any = self._tokenizer
            kept = backend.normalizer, backend.pre_tokenizer
            backend.normalizer, backend.pre_tokenizer = None, None
            try:
                return super()._run(words, plan, {**options, "is_split_into_words": True})
            finally:
                backend.normalizer, backend.pre_tokenizer = kept

    def _item(self, item: Any, split: bool, known: tuple[str, ...]) -> Any:
        """The words of a text, or a pair of lists of words."""
        if isinstance(item, tuple):
            return tuple(self._words(text, split, known) for text in cast(tuple[Any, Any], item))
        return self._words(item, split, known)

    def _words(self, text: Any, split: bool, known: tuple[str, ...]) -> list[str]:
        segments: list[str] = list(text) if split else [text]
        if known:
            pattern = "|".join(re.escape(token) for token in sorted(known, key=len, reverse=True))
            segments = [
                subsegment for segment in segments for subsegment in re.split(f"({pattern})", segment)
            ]
        repair, split_words = _packages()
        words: list[str] = []
        for segment in segments:
            if segment in known:
                words.append(segment)
            elif segment:
                # spaCy's token for a line break includes the space after it.
                found = (str(word.text).lower() for word in split_words(standardized(repair(segment))))
                words += ["\n" if word.strip(" ") == "\n" else word for word in found]
        return words
