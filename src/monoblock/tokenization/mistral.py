"""Mistral's prompts, for checkpoints that come without a chat template: versions 1, 2, 3, and 3 with Tekken.

The templates follow Mistral's published samples. What the versions share:
- A prompt is `<s>`, then per turn `[INST] question [/INST] answer</s>`; the system's text goes before a question:
  the first one's in version 1, the last one's later.
- Messages of one role in a row are one message.
- From version 2 on tools stand before the last question, calls and results between tokens of their own, as JSON.
  Version 2 leaves out the calls before the last question; version 3 names each call by its id.
- Each piece of text begins with a space, but with Tekken.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from monoblock.tokenization.protobuf import SentencePieceModel

FOLDER = Path(__file__).parent / "templates"


@lru_cache(maxsize=8)
def template(version: int, *, spaces: bool = True) -> str:
    """The chat template of a version; `spaces=False` for Tekken."""
    head = f"{{%- set version = {version} %}}\n{{%- set space = {' ' if spaces else ''!r} %}}\n"
    return head + (FOLDER / "mistral.jinja").read_text(encoding="utf-8")


def sentencepiece_template(path: str | Path, model: SentencePieceModel) -> str | None:
    """The template of a `tokenizer.model`, by the version in its name, else by its special tokens.

    Version 1 has no special tokens of its own, so a `tokenizer.model` without a version may be anybody's: None. So
    it is for versions after 3, whose prompts differ.
    """
    suffix = Path(path).suffix
    if suffix in (".v1", ".v2", ".v3"):
        return template(int(suffix[2:]))
    pieces = set(model.pieces)
    if suffix.startswith(".v") or "[SYSTEM_PROMPT]" in pieces or "[INST]" not in pieces:
        return None
    return template(3 if "[PREFIX]" in pieces else 2)


def tekken_template(version: str) -> str | None:
    """The template of a `tekken.json`, by the version that it says; None for versions after 3."""
    return template(3, spaces=False) if version == "v3" else None
