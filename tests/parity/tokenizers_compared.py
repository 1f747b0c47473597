"""Small trained tokenizers, and comparisons of their calls in monoblock and transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from monoblock.tokenization import AutoTokenizer

transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parents[2] / "../shared/data"
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Grüße aus Köln, 你好世界, здравствуй, مرحبا, 🎉👩‍👩‍👧!",
]
LINES = [
    *TEXT,
    "",
    " ",
    "  two  spaces   three    four\t\ttabs\r\n\n",
    "<|endoftext|> inside <|endoftext|>",
    "e\u0301 composed and é",
    "zero\u200bwidth \x00 \x07 control",
    "it's I'm we've don't they're , . ! ?",
]


def trained(trainer: Any, model: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


def byte_level(folder: Path) -> dict[str, Any]:
    """Like GPT-NeoX's: no template, trimmed offsets, runs of spaces as added tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = trained(
        trainer,
        models.BPE(),
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        post_processor=processors.ByteLevel(trim_offsets=True),
        decoder=decoders.ByteLevel(),
    )
    tokenizer.add_tokens(["    ", "  "])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>", "unk_token": "<|endoftext|>"}


def with_template(folder: Path) -> dict[str, Any]:
    """Like Llama's: `<s> A </s>`, and for pairs `<s> A </s> <s> B </s>` with token types 0 and 1."""
    config = byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s>:1 $B:1 </s>:1", special_tokens=ids
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {
        **config,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def word_piece(folder: Path) -> dict[str, Any]:
    """Like BERT's: lower-case WordPiece, with clean_up_tokenization_spaces."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = trained(
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        models.WordPiece(unk_token="[UNK]"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
        post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad", "unk", "cls", "sep", "mask")
    return {f"{name}_token": f"[{name.upper()}]" for name in names} | {"clean_up_tokenization_spaces": True}


def neox(folder: Path) -> dict[str, Any]:
    source = DATA / "gpt-neox/tokenizer.json"
    if not source.exists():
        pytest.skip("the tokenizer of GPT-NeoX is not available")
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    return {"tokenizer_class": "GPTNeoXTokenizer", "model_max_length": 2048, "eos_token": "<|endoftext|>"}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "byte-level": byte_level,
    "template": with_template,
    "word-pieces": word_piece,
    "neox": neox,
}


def saved_tokenizer(name: str, folder: Path) -> Path:
    """Saves a tokenizer of that kind in the folder; returns the folder."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40, **KINDS[name](folder)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def both(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The tokenizer of a folder, ours and transformers'."""
    return tuple(
        auto.from_pretrained(folder, **options) for auto in (AutoTokenizer, transformers.AutoTokenizer)
    )


def outcome(
    call: Callable[[], Any], errors: tuple[type[BaseException], ...] = (ValueError, TypeError)
) -> Any:
    """The result as plain values, or "an error" for one of those exceptions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except errors:
            return "an error"
    if hasattr(result, "keys"):
        return {key: plain(value) for key, value in result.items()}
    return plain(result)


def plain(value: Any) -> Any:
    return (type(value).__name__, str(value.dtype), value.tolist()) if hasattr(value, "tolist") else value


def same(pair: tuple[Any, Any], call: Callable[[Any], Any], what: str = "") -> None:
    """Both return the same value, or both raise; transformers may raise anything, its backend's panics included."""
    mine, theirs = outcome(lambda: call(pair[0])), outcome(lambda: call(pair[1]), (BaseException,))
    assert mine == theirs, f"{what}\nmonoblock:    {mine}\ntransformers: {theirs}"


SPECIAL = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]


def specials(tokenizer: Any) -> Any:
    named = {
        name: (getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id"))
        for name in SPECIAL
    }
    extra = (tokenizer.extra_special_tokens, tokenizer.extra_special_tokens_ids)
    return named, extra, tokenizer.special_tokens_map, tokenizer.all_special_tokens, tokenizer.all_special_ids
