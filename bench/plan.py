"""What the benchmark measures: groups of a model and a form of its weights, with backends that take turns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from figures import BEFORE, LOSSLESS

PROMPT = 32  # tokens before those that decoding makes
ALL = ("monoblock", BEFORE, LOSSLESS, "transformers", "llama.cpp", "OpenVINO", "CTranslate2")
HUB = ("monoblock", BEFORE, "transformers")
CHECKED = 24  # tokens of the check of accuracy


@dataclass(frozen=True)
class Measure:
    """One figure: what is timed, its size, and how often.

    kind "decode": `size` texts at once, `new` tokens each. "prefill": a prompt of `size` tokens and one token more.
    "train": a step on 4 texts of `size` tokens. `who`: the backends, where not all of the group's.
    """

    kind: str
    size: int
    rounds: int
    new: int = 24
    who: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """As tables have it."""
        return f"{self.kind} {self.size}"

    @property
    def tokens(self) -> int:
        """Tokens that a round makes or reads."""
        return {"decode": self.size * self.new, "prefill": self.size, "train": 4 * self.size}[self.kind]


@dataclass(frozen=True)
class Group:
    """A model in one form; all its backends are loaded at once. `seconds`: what it may take of 15 minutes; then
    no rounds begin beyond the second. `starts`: how often each is started anew, for the figures of loading. `fresh`:
    whether loading needs memory of its own. Then the system is asked for as much before each loading, which is a figure
    too, and gets it back: the host of a virtual machine may have to find it first, whoever asks.
    """

    model: str
    form: str
    who: tuple[str, ...]
    measures: tuple[Measure, ...]
    seconds: int
    starts: int = 1
    fresh: bool = False
    accuracy: bool = True


def _decode(size: int, rounds: int, new: int = 24) -> Measure:
    return Measure("decode", size, rounds, new)


def _prefill(size: int, rounds: int, who: tuple[str, ...] | None = None) -> Measure:
    return Measure("prefill", size, rounds, who=who)


# What the targets of docs/performance.md speak of.
ESSENTIAL = (
    Group("mistral-1b", "bfloat16", ALL, (_decode(1, 5), _prefill(512, 3), _decode(8, 3)), 360, starts=3),
    Group("mistral-1b", "float32", HUB, (_decode(1, 3, 16), _prefill(512, 2)), 93, starts=4, fresh=True),
    Group("mistral-1b", "int8", ALL, (_decode(1, 5), _prefill(512, 3), _decode(8, 3)), 90),
    Group("mistral-1b", "int4", ALL, (_decode(1, 5), _prefill(512, 3), _decode(8, 3)), 80),
    Group("mpt-1b", "bfloat16", ALL, (_decode(1, 5, 16), _prefill(512, 2)), 95),
    Group("gpt-neo-125m", "float32", HUB, (_decode(1, 7), _prefill(512, 3)), 25),
    Group("openai-gpt", "float32", HUB, (_decode(1, 7), _prefill(448, 3)), 25),
    Group(
        "mpt-small",
        "float32",
        HUB,
        (_prefill(8192, 1), _prefill(8192, 2, ("monoblock",)), _prefill(65536, 1, ("monoblock",))),
        150,
        accuracy=False,
    ),
    Group("thin-4", "float32", HUB, (_decode(1, 7, 900),), 18, accuracy=False),
    Group("thin-28", "float32", HUB, (_decode(1, 7, 400),), 24, accuracy=False),
)
# And what takes longer.
FULL = (
    *(replace(group, seconds=4 * group.seconds) for group in ESSENTIAL),
    Group("mistral-1b", "bfloat16", ALL, (_prefill(2048, 3), _prefill(8192, 2)), 600, accuracy=False),
    Group("mistral-1b", "int8", ALL, (_prefill(2048, 3),), 200, accuracy=False),
    Group("mistral-1b", "int4", ALL, (_prefill(2048, 3),), 200, accuracy=False),
    Group("gpt-neo-125m", "float32", HUB, (Measure("train", 512, 3),), 200, accuracy=False),
    Group("gpt-neo-125m", "bfloat16", HUB, (Measure("train", 512, 3),), 200, accuracy=False),
)
# The same code with small models, to see that everything works.
_BOTH = (_decode(1, 2, 4), _prefill(64, 2), _decode(8, 2, 4))
QUICK = (
    Group("mistral-1b", "bfloat16", ALL, _BOTH, 30),
    Group("mistral-1b", "float32", HUB, _BOTH[:1], 30, starts=2, fresh=True),
    Group("mistral-1b", "int8", ALL, _BOTH[:2], 30),
    Group("mistral-1b", "int4", ALL, _BOTH[:2], 30),
    Group("mpt-1b", "bfloat16", HUB, _BOTH[:2], 20),
    Group("mpt-small", "float32", HUB, (_prefill(2048, 1),), 30, accuracy=False),
    Group("gpt-neo-125m", "float32", HUB, (Measure("train", 64, 2),), 20, accuracy=False),
    Group("thin-4", "float32", ("monoblock",), (_decode(1, 2, 8),), 10, accuracy=False),
    Group("thin-28", "float32", ("monoblock",), (_decode(1, 2, 8),), 10, accuracy=False),
)
PLANS = {"essential": ESSENTIAL, "full": FULL, "quick": QUICK}
