"""Tokenizers that are difficult to stream: byte-level BPE, byte fallback, WordPiece."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_level(*merged: str) -> Tokenizer:
    """GPT-style: every byte is a token, and so are the strings `merged`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for text in merged:
        [(letters, _)] = splitter.pre_tokenize_str(text)
        for end in range(2, len(letters) + 1):
            pair = (letters[: end - 1], letters[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def byte_fallback(*words: str) -> Tokenizer:
    """Llama-style: words with a leading ▁, bytes as <0xXX>; decoding strips the first space."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for word in words:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def word_piece(*words: str) -> Tokenizer:
    """BERT-style: ## continuation tokens, and decoding with clean-up of spaces before punctuation."""
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The byte tokens of a text, for a `byte_fallback` tokenizer."""
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
