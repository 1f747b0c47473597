"""Small byte-level BPE tokenizers, trained by the tests."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from monoblock.tokenization import PreTrainedTokenizerFast

TEXT = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln 🎉", "def f(n): return n + 1"]


@functools.cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    return backend.to_str()


def backend(template: bool = False) -> Tokenizer:
    """Byte-level BPE; with `template` inputs become `<s> A </s>` and `<s> A </s> B </s>`."""
    made = Tokenizer.from_str(_trained())
    if template:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return made


def tokenizer(template: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with that backend; `<s>`, `</s>` and `<pad>` have the ids 0, 1 and 2."""
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend(template), **(defaults | options))
