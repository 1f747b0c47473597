"""The special tokens around a text: making the template that adds them, and reading what one does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers.processors import TemplateProcessing


def bos_eos_template(
    bos: tuple[str | None, int | None] | None, eos: tuple[str | None, int | None] | None
) -> Any:
    """The post-processor that writes `bos text eos`, and for a pair `bos first eos bos second eos`.

    Each argument is (token, id), or None where there is to be none; ValueError if a wanted token is not set.
    """
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and (token[0] is None or token[1] is None):
            raise ValueError(
                f"add_{name}_token=True needs a {name}_token that the vocabulary has; it is {token[0]!r}"
            )

    def sides(text: str, kind: int) -> list[str]:
        return [f"{part}:{kind}" for part in (bos and bos[0], text, eos and eos[0]) if part]

    return TemplateProcessing(
        single=sides("$A", 0),
        pair=[*sides("$A", 0), *sides("$B", 1)],
        special_tokens=list(dict.fromkeys(token for token in (bos, eos) if token)),
    )


class Around(NamedTuple):
    """Ids with special tokens, their token types, and 1 where a special token is."""

    ids: list[int]
    types: list[int]
    mask: list[int]


def around(backend: Any, first: Sequence[int], second: Sequence[int] | None = None) -> Around:
    """What the backend's post-processor puts around ids.

    The backend takes texts only, so a sample text shows where the texts stand among the special tokens; the
    ids then take the samples' places.
    """
    # A vocabulary that knows no "a" still knows its own tokens.
    text = (
        "a" if backend.encode("a", add_special_tokens=False).ids else next(iter(backend.get_vocab(False)), "")
    )
    sample = backend.encode(text) if second is None else backend.encode(text, text)
    made = Around([], [], [])
    texts: tuple[Sequence[int], Sequence[int]] = (first, second or ())
    done: set[int] = set()
    for index, kind, sequence in zip(sample.ids, sample.type_ids, sample.sequence_ids, strict=True):
        if sequence is None:
            made.ids.append(index)
            made.types.append(kind)
            made.mask.append(1)
        elif sequence not in done:
            done.add(sequence)
            ids = texts[int(sequence)]
            made.ids.extend(ids)
            made.types.extend([kind] * len(ids))
            made.mask.extend([0] * len(ids))
    return made
