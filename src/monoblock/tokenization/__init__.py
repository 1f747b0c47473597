"""Tokenizers and chat templates. Modules, and with them the `tokenizers` library, are imported on first access."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoblock.tokenization.auto import AutoTokenizer
    from monoblock.tokenization.classes import (
        GPT2Tokenizer,
        GPT2TokenizerFast,
        GPTNeoXTokenizerFast,
        LlamaTokenizer,
        LlamaTokenizerFast,
        MPNetTokenizer,
        MPNetTokenizerFast,
        OpenAIGPTTokenizer,
        OpenAIGPTTokenizerFast,
    )
    from monoblock.tokenization.encoding import BatchEncoding, CharSpan, TokenSpan
    from monoblock.tokenization.fast import PreTrainedTokenizerFast
    from monoblock.tokenization.schema import get_json_schema
    from monoblock.tokenization.template import ChatTemplateError

_MODULES = {
    "AutoTokenizer": "auto",
    "BatchEncoding": "encoding",
    "CharSpan": "encoding",
    "ChatTemplateError": "template",
    "GPT2Tokenizer": "classes",
    "GPT2TokenizerFast": "classes",
    "GPTNeoXTokenizerFast": "classes",
    "LlamaTokenizer": "classes",
    "LlamaTokenizerFast": "classes",
    "MPNetTokenizer": "classes",
    "MPNetTokenizerFast": "classes",
    "OpenAIGPTTokenizer": "classes",
    "OpenAIGPTTokenizerFast": "classes",
    "PreTrainedTokenizerFast": "fast",
    "TokenSpan": "encoding",
    "get_json_schema": "schema",
}

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "CharSpan",
    "ChatTemplateError",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "MPNetTokenizer",
    "MPNetTokenizerFast",
    "OpenAIGPTTokenizer",
    "OpenAIGPTTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenSpan",
    "get_json_schema",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
