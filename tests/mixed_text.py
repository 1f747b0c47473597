"""Lines of mixed text for comparing tokenizers: the same at every run."""

from __future__ import annotations

import random

WORDS, RANGES = ((0x20, 0x24F), (0x370, 0x1FFF), (0x2000, 0xD7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF))


def _any(rng: random.Random) -> str:
    return "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.randint(1, 5)))


# How a piece of a line is made, and how often.
PIECES = (
    (36, lambda r: r.choice(WORDS)),
    (10, lambda r: r.choice(CODE)),
    (8, lambda r: "".join(r.choice(CJK) for _ in range(r.randint(1, 9)))),
    (7, lambda r: "".join(r.choice(EMOJI) for _ in range(r.randint(1, 3)))),
    (5, lambda r: r.choice(CONTROL)),
    (5, lambda r: r.choice(MARKS)),
    (5, lambda r: r.choice(SPECIAL)),
    (5, lambda r: r.choice(SCRIPTS)),
    (6, lambda r: str(r.randint(0, 10 ** r.randint(1, 12)))),
    (4, lambda r: " " * r.randint(2, 40)),
    (3, lambda r: r.choice("\t\n\r") * r.randint(1, 4)),
    (3, lambda r: r.choice("aoeuX.-=*#~!") * r.randint(2, 20)),
    (3, _any),
)


def mixed_lines(count: int = 10_000, seed: int = 7) -> list[str]:
    """Code, scripts, CJK, emoji with joiners, control characters, runs of anything, look-alikes of special tokens."""
    rng = random.Random(seed)
    weights, makers = zip(*PIECES, strict=True)

    def line() -> str:
        pieces = rng.choices(makers, weights, k=rng.randint(1, 14))
        start = rng.choice(("", "", " ", "  ", "\n", "    "))
        return start + "".join(make(rng) + rng.choice((" ", " ", " ", "", "", "  ")) for make in pieces)

    return [line() for _ in range(count)]
