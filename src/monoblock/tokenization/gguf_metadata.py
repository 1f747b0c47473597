"""A tokenizer as metadata of a GGUF file: the inverse of gguf.py, checked by encoding texts with both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monoblock.checkpoint.gguf.header import GgufHeader
from monoblock.errors import UnsupportedConfig
from monoblock.tokenization import gguf
from monoblock.tokenization.fast import PreTrainedTokenizerFast
from monoblock.tokenization.protobuf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from monoblock.tokenization.sentencepiece import SPACE

_OWNER = "tokenizer.ggml."
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_PROBES = (
    "The quick brown fox", " two  spaces ", "Grüße aus Köln: 12345 €", "def f(n):\n\treturn n + 1\r\n", "東京 🎉",
    "", " ", "I'm, you've; IT'S", "a" * 40, "1,234.5e-6", "\n\n  x", "e\u0301",
)  # fmt: skip
_MOST_PROBES = 400  # tokens of the vocabulary that are encoded, spread over it


def tokenizer_metadata(tokenizer: PreTrainedTokenizerFast, rows: int) -> dict[str, Any]:
    """The entries of a tokenizer for a model with `rows` embeddings.

    UnsupportedConfig: it is no BPE, its pre-tokenizer has no name in GGUF, or texts would be encoded differently.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or tokenizer.vocab_size == 0:
        raise _unsupported(f"its model is {model['type']}, not BPE")
    vocab = tokenizer.get_vocab()
    if not model["merges"]:
        raise _unsupported("it has no merges")
    if max(vocab.values()) >= rows:
        raise _unsupported(f"it has {max(vocab.values()) + 1} tokens, but the model has {rows} embeddings")
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in vocab.items():
        tokens[index], types[index] = token, NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    byte_level = "ByteLevel" in json.dumps(content["pre_tokenizer"])
    found: dict[str, Any] = {_OWNER + "tokens": tokens, _OWNER + "token_type": types}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if byte_level:
        found |= {_OWNER + "model": "gpt2", _OWNER + "pre": _pre(content)}
        found[_OWNER + "merges"] = [" ".join(pair) for pair in merges]
    else:
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        for token, index in vocab.items():
            if token in _BYTES:
                types[index] = BYTE
            elif types[index] == NORMAL and len(token) > 1 and token not in ranks:
                # No merge makes it: texts are split around it, or never encoded to it.
                text = token.replace(SPACE, " ")
                ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
                types[index] = USER_DEFINED if index in ids else UNUSED
        unknown = model.get("unk_token")
        if unknown in vocab:
            types[vocab[unknown]] = UNKNOWN
        least = len(merges)
        prefix = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        found |= {
            _OWNER + "model": "llama",
            _OWNER + "pre": "default",
            _OWNER + "scores": [-float(ranks.get(token, least + i)) for i, token in enumerate(tokens)],
            _OWNER + "add_space_prefix": bool(prefix) and prefix[0].startswith(SPACE),
        }
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    found |= {f"{_OWNER}{name}_token_id": index for name, index in ids.items() if index is not None}
    text = tokenizer("a").input_ids
    found[_OWNER + "add_bos_token"] = ids["bos"] is not None and text[:1] == [ids["bos"]]
    found[_OWNER + "add_eos_token"] = ids["eos"] is not None and text[-1:] == [ids["eos"]]
    found |= _templates(tokenizer.chat_template)
    _check(tokenizer, found)
    return found


def _unsupported(why: str) -> UnsupportedConfig:
    return UnsupportedConfig(f"the tokenizer cannot be written as GGUF: {why}")


def _pre(content: dict[str, Any]) -> str:
    """The name of a byte-level pre-tokenizer."""
    parts = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
    bytes_of = next(part for part in parts if part["type"] == "ByteLevel")
    if bytes_of.get("add_prefix_space"):
        raise _unsupported("it adds a space before texts (add_prefix_space)")
    patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    if not patterns and bytes_of.get("use_regex", True):
        patterns = [gguf.PATTERNS["gpt-2"][0]]
    merged = bool(content["model"].get("ignore_merges"))
    normal = json.dumps(content["normalizer"])
    names = [
        name
        for name, (pattern, ignore, _) in gguf.PATTERNS.items()
        if patterns == [pattern] and ignore == merged and ("NFC" in normal) == (name == "mpt")
    ]
    if not names:
        raise _unsupported("its pre-tokenizer has no name there")
    return names[0]


def _templates(templates: Any) -> dict[str, Any]:
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    named = {name: text for name, text in templates.items() if name != "default"}
    found: dict[str, Any] = {"tokenizer.chat_templates": list(named)} if named else {}
    found |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    return found | ({"tokenizer.chat_template": templates["default"]} if "default" in templates else {})


def _check(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Any]) -> None:
    """UnsupportedConfig unless the tokenizer of the metadata encodes as the original."""
    header = GgufHeader(path=Path("the file"), metadata=metadata, tensors={})
    again = PreTrainedTokenizerFast(**gguf.arguments(header))
    ids = range(0, len(tokenizer.get_vocab()), max(1, len(tokenizer.get_vocab()) // _MOST_PROBES))
    texts = [*_PROBES, *(tokenizer.decode([index]) for index in ids)]
    texts += [first + second for first, second in zip(texts, texts[7:], strict=False)]
    for text in texts:
        if (found := again(text).input_ids) != (wanted := tokenizer(text).input_ids):
            raise _unsupported(f"{text!r} would be encoded as {found[:12]}, not {wanted[:12]}")
