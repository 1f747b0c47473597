"""The special tokens that a post-processor adds to a text: building one, and reading the effect of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers.processors import TemplateProcessing


def bos_eos_template(
    bos: tuple[str | None, int | None] | None, eos: tuple[str | None, int | None] | None
) -> Any:
    """The post-processor that adds `bos text eos`, and for a pair `bos first eos bos second eos`.

    Each argument is (token, id), or None to leave it out; ValueError if a requested token is not set.
    """
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and (token[0] is None or token[1] is None):
            raise ValueError(
                f"add_{name}_token=True needs a {name}_token that the vocabulary has; it is {token[0]!r}"
            )

    def template(text: str, kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in (bos and bos[0], text, eos and eos[0]) if token]

    return TemplateProcessing(
        single=template("$A", 0),
        pair=[*template("$A", 0), *template("$B", 1)],
        special_tokens=list(dict.fromkeys(token for token in (bos, eos) if token)),
    )


class IdsWithSpecialTokens(NamedTuple):
    """Ids with special tokens, their token type ids, and a mask with 1 for special tokens."""

    ids: list[int]
    types: list[int]
    mask: list[int]


def with_special_tokens(
    backend: Any, first: Sequence[int], second: Sequence[int] | None = None
) -> IdsWithSpecialTokens:
    """The result of the backend's post-processor for ids.

    The backend takes texts only, so a sample text shows the positions of the texts among the special tokens; the ids
    then replace the samples.
    """
    # A vocabulary that cannot encode "a" can encode one of its own tokens.
    text = (
        "a" if backend.encode("a", add_special_tokens=False).ids else next(iter(backend.get_vocab(False)), "")
    )
    sample = backend.encode(text) if second is None else backend.encode(text, text)
    result = IdsWithSpecialTokens([], [], [])
    texts: tuple[Sequence[int], Sequence[int]] = (first, second or ())
    done: set[int] = set()
    for index, kind, sequence in zip(sample.ids, sample.type_ids, sample.sequence_ids, strict=True):
        if sequence is None:
            result.ids.append(index)
            result.types.append(kind)
            result.mask.append(1)
        elif sequence not in done:
            done.add(sequence)
            ids = texts[int(sequence)]
            result.ids.extend(ids)
            result.types.extend([kind] * len(ids))
            result.mask.extend([0] * len(ids))
    return result
