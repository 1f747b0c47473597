"""Mistral's chat templates, for checkpoints without one: versions 1, 2, 3, and 3 with Tekken.

The templates follow Mistral's published samples. Common to all versions:
- A prompt is `<s>`, then per turn `[INST] question [/INST] answer</s>`; the system message precedes a question: the
  first one in version 1, the last one later.
- Consecutive messages of one role are merged.
- From version 2 on, tools precede the last question; calls and results are JSON between special tokens.
  Version 2 omits the calls before the last question; version 3 has an id for each call.
- Each text begins with a space, except with Tekken.
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

    None for version 1 without a version in the name, as its vocabulary has no special tokens that identify it, and for
    versions after 3, whose prompts differ.
    """
    suffix = Path(path).suffix
    if suffix in (".v1", ".v2", ".v3"):
        return template(int(suffix[2:]))
    pieces = set(model.pieces)
    if suffix.startswith(".v") or "[SYSTEM_PROMPT]" in pieces or "[INST]" not in pieces:
        return None
    return template(3 if "[PREFIX]" in pieces else 2)


def tekken_template(version: str) -> str | None:
    """The template of a `tekken.json`, by its version; None for versions after 3."""
    return template(3, spaces=False) if version == "v3" else None
