"""The benchmark's measurements: groups of a model and a form of its weights, with alternating backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from figures import BEFORE, LOSSLESS

PROMPT = 32  # tokens of a prompt before decoding
ALL = ("monoblock", BEFORE, LOSSLESS, "transformers", "llama.cpp", "OpenVINO", "CTranslate2")
HUB = ("monoblock", BEFORE, "transformers")
CHECKED = 24  # new tokens in the accuracy comparison


@dataclass(frozen=True)
class Measure:
    """A measure: its kind, size and number of rounds.

    kind "decode": batch size `size`, `new` tokens per sequence. "prefill": a prompt of `size` tokens and one new token.
    "train": a step on 4 sequences of `size` tokens. `who`: the backends, by default all of the group.
    """

    kind: str
    size: int
    rounds: int
    new: int = 24
    who: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The name in results and tables."""
        return f"{self.kind} {self.size}"

    @property
    def tokens(self) -> int:
        """Tokens generated or processed in a round."""
        return {"decode": self.size * self.new, "prefill": self.size, "train": 4 * self.size}[self.kind]


@dataclass(frozen=True)
class Group:
    """A model in one form, with all its backends loaded at the same time.

    `seconds`: time budget of 15 minutes in all, after which no round beyond the second begins. `starts`: number of
    starts of each backend, for the figures of loading. `fresh`: whether loading allocates memory for the weights; then
    the time of allocating as much is measured before each load, since the host of a virtual machine may have to
    provide the memory first.
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


# The measurements for the targets of docs/performance.md.
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
# Additional measurements, which take longer.
FULL = (
    *(replace(group, seconds=4 * group.seconds) for group in ESSENTIAL),
    Group("mistral-1b", "bfloat16", ALL, (_prefill(2048, 3), _prefill(8192, 2)), 600, accuracy=False),
    Group("mistral-1b", "int8", ALL, (_prefill(2048, 3),), 200, accuracy=False),
    Group("mistral-1b", "int4", ALL, (_prefill(2048, 3),), 200, accuracy=False),
    *(
        Group("mistral-1b", form, ALL, (_decode(16, 3), _decode(32, 2), _decode(64, 2)), 300, accuracy=False)
        for form in ("bfloat16", "int8", "int4")
    ),
    Group("gpt-neo-125m", "float32", HUB, (Measure("train", 512, 3),), 200, accuracy=False),
    Group("gpt-neo-125m", "bfloat16", HUB, (Measure("train", 512, 3),), 200, accuracy=False),
)
# Small models, for testing the benchmark.
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
