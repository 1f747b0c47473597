"""Checkpoints for pipelines: tiny random models with a WordPiece or a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_families
import transformers
from tiny_families import transformers_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "I-LOC"}
NLI = {0: "contradiction", 1: "neutral", 2: "entailment", 3: "unsure"}
SPECIAL = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
PIECES = (
    "the",
    "quick",
    "brown",
    "fox",
    "jump",
    "##s",
    "over",
    "lazy",
    "dog",
    "köln",
    "##er",
    ",",
    ".",
    "?",
    "!",
    "who",
)
LIMIT = 24  # the tokenizers' model_max_length; the models have 64 positions
TEXT = "The quick brown foxs jumps over Köln, the lazy dog. Who jumps over the fox? The brownest of dogs!"
LONG = " ".join([TEXT] * 5)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last or add_generation_prompt %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words() -> Tokenizer:
    """Lower-case WordPiece: `<s> A </s>` and `<s> A </s></s> B </s>`; ids 0 to 4 are the special tokens."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocab = dict.fromkeys([*SPECIAL, *PIECES, *letters, *("##" + c for c in letters)])
    tokenizer = Tokenizer(
        models.WordPiece(
            {token: i for i, token in enumerate(vocab)}, unk_token="[UNK]", max_input_chars_per_word=40
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def letters() -> Tokenizer:
    """Byte-level without merges, limited to the tiny vocabulary; ids 0 to 3 are the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = [c for c in alphabet if c.isascii() and (c.islower() or c in "<>,.?!BTW")] + ["Ġ", "Ċ"]
    alphabet = [*first, *(c for c in alphabet if c not in first)][: tiny_families.VOCAB - 4]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def folder(at: Path, name: str, **fields: Any) -> Path:
    """A checkpoint of that class, written by transformers, with its tokenizer."""
    model_type = tiny_families.CLASSES[name]
    model = transformers_model(name, **tiny_families.fields(model_type, **fields))
    model.save_pretrained(at)
    if model_type == "mpnet":
        backend = words()
        special = {"cls_token": "<s>", "sep_token": "</s>", "unk_token": "[UNK]", "mask_token": "<mask>"}
    else:
        backend, special = letters(), {"unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=LIMIT,
        **{**special, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        model_input_names=["input_ids", "attention_mask"],
    )
    if model_type != "mpnet":
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(at)
    return at
