"""Lines of mixed text for comparing tokenizers, from a fixed seed."""

from __future__ import annotations

import random

WORDS, SCRIPTS = (
    line.split()
    for line in (
        "the of and function return import class self hello world Paris naïve café Straße über coöperate don't I'm "
        "we've it's 3.14 2024 1,000 0x1F __init__ fooBar HTTPServer",
        "здравствуйте мир Ελληνικά שלום עולם مرحبا بالعالم नमस्ते ไทยภาษา አማርኛ ქართული",
    )
)
CODE = [
    *("def f(x):", "    return x**2", "\tif (a && b) {", "  for i in range(10):", "x = {'a': [1, 2, 3]}"),
    *("// comment", "#include <stdio.h>", "</div>", "SELECT * FROM t;", "a->b != c;", "\\frac{1}{2}", "!!!"),
    *("...", "=====", "-----", "aaaaaaa", "hahahahaha", "____", "((((", "/*****/"),
]
CJK = "你好世界今天天气很好日本語の文章カタカナひらがな한국어문장을\U00020000龘"
EMOJI = [
    *("😀", "👩\u200d👩\u200d👧", "👨\u200d💻", "🇫🇷", "❤\ufe0f", "🏳\ufe0f\u200d🌈", "👍🏽"),
    *("🤦🏼\u200d♂\ufe0f", "\u200d", "🎉"),
]
CONTROL = [chr(c) for c in (*range(32), 127, 0x85, 0xA0, 0xAD, 0x200B, 0x200E, 0x2028, 0x3000, 0xFEFF)]
MARKS = ["e\u0301", "a\u0323\u0307", "ñ", "ộ", "İ", "ß", "ǆ", "ﬁ", "Å", "½", "\u0663", "१२", "①", "ⅷ", "ﷺ"]
SPECIAL = [
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<mask>",
        "[INST]",
        "[/INST]",
        "<|endoftext|>",
        "<|padding|>",
        "[UNK]",
    ),
    *("[PAD]", "<0x0A>", "<0xE2>", "[TOOL_CALLS]", "[REFERENCE_DOC_3]", "<SPECIAL_20>", "▁", "▁the", " ⁇ "),
]
RANGES = ((0x20, 0x24F), (0x370, 0x1FFF), (0x2000, 0xD7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF))


def _any(rng: random.Random) -> str:
    return "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.randint(1, 5)))


# (weight, generator) of the segments of a line.
SEGMENTS = (
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
    """Code, scripts, CJK, emoji with joiners, control characters, repeated characters, spellings of special tokens."""
    rng = random.Random(seed)
    weights, generators = zip(*SEGMENTS, strict=True)

    def line() -> str:
        segments = rng.choices(generators, weights, k=rng.randint(1, 14))
        start = rng.choice(("", "", " ", "  ", "\n", "    "))
        return start + "".join(
            generate(rng) + rng.choice((" ", " ", " ", "", "", "  ")) for generate in segments
        )

    return [line() for _ in range(count)]
