"""docs/demo.md and docs/demo-loss.svg, written from a run's own figures."""

import argparse
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_corpus as corpus
import demo_curve as curve
import demo_data as data
import torch


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the page says about a run. `held_out` maps a window's length to the loss at it, nats per token."""

    run: argparse.Namespace
    log: list[dict[str, float]]
    config: Any
    documents: Sequence[corpus.Document]
    params: int
    size: int
    epoch_tokens: int
    held_out: dict[int, float]
    bytes_per_token: float
    samples: list[tuple[str, str, str]]

    def bits_per_byte(self, length: int) -> float:
        return self.held_out[length] / math.log(2) / self.bytes_per_token


def write(facts: Facts, folder: Path) -> None:
    """The page and its picture."""
    million = [(entry["tokens"] / 1e6, entry) for entry in facts.log]
    lines = {
        "training": curve.smoothed([(x, entry["loss"]) for x, entry in million], 400),
        "held out": [(x, entry["held_out"]) for x, entry in million if "held_out" in entry],
    }
    picture = curve.draw(lines, "million tokens", "loss, nats per token")
    (folder / "demo-loss.svg").write_text(picture, encoding="utf-8")
    (folder / "demo.md").write_text(page(facts), encoding="utf-8")


def page(facts: Facts) -> str:
    return "\n".join(
        [
            INTRODUCTION,
            "## Figures\n",
            *figures(facts),
            "\n![Training and held-out loss](demo-loss.svg)\n",
            "The held-out curve is measured on a quarter of the held-out text, the table on all of it.\n",
            *lengths(facts),
            "\n## Training data\n",
            CORPUS,
            *texts(facts),
            TRAINING,
            "```\n" + command(facts) + "\n```\n",
            clock(facts) + "\n",
            "## Samples\n",
            "Not selected, with the folder's sampling settings, in bfloat16, at most 120 tokens, seed 0:\n",
            *(
                f"**{title}**\n\n```python\n{prompt}{reply.rstrip()}\n```\n"
                for title, prompt, reply in facts.samples
            ),
            LIMITS,
        ]
    )


def figures(facts: Facts) -> list[str]:
    last, config, length = facts.log[-1], facts.config, facts.run.length
    tail = [entry["loss"] for entry in facts.log[-100:]]
    shape = f"{config.n_layers} layers, width {config.d_model}, {config.n_heads} heads"
    rows = {
        "Shape": f"MPT, {shape}, ALiBi, no biases, tied embeddings",
        "Parameters": f"{facts.params:,}",
        "Size of the folder, in bfloat16": f"{facts.size / 1e6:.2f} MB",
        "Vocabulary": f"{config.vocab_size:,} byte-level BPE tokens; {facts.bytes_per_token:.2f} bytes a token",
        "Seed": f"{facts.run.seed}",
        "Steps": f"{last['step']:,} of {facts.run.batch} windows of {length} tokens",
        "Tokens seen": f"{last['tokens']:,.0f} ({last['tokens'] / facts.epoch_tokens:.1f} epochs)",
        "Time": f"{last['seconds'] / 60:.0f} minutes, {last['tokens'] / last['seconds']:,.0f} tokens/s, "
        f"on {facts.run.threads} CPU threads shared with other work",
        "Training loss, mean of the last 100 steps": f"{sum(tail) / len(tail):.3f} nats per token",
        "Held-out loss": f"{facts.held_out[length]:.3f} nats per token",
        "**Held-out perplexity**": f"**{math.exp(facts.held_out[length]):.2f}** per token",
        "**Held-out bits per byte**": f"**{facts.bits_per_byte(length):.3f}** (does not depend on the tokenizer)",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def lengths(facts: Facts) -> list[str]:
    rows = [
        f"| {length} | {loss:.3f} | {math.exp(loss):.2f} | {facts.bits_per_byte(length):.3f} |"
        for length, loss in facts.held_out.items()
    ]
    return [
        f"ALiBi extrapolates; all training windows had {facts.run.length} tokens.\n",
        "| Window, tokens | Loss | Perplexity | Bits per byte |",
        "|---|---|---|---|",
        *rows,
    ]


def texts(facts: Facts) -> list[str]:
    shown = [document for document in facts.documents if not document.held_out]
    parts = {
        "library": [document for document in shown if not document.is_test],
        "its tests": [document for document in shown if document.is_test],
        "held out": [document for document in facts.documents if document.held_out],
    }
    rows = [
        f"| {name} | {len(part)} | {sum(len(document.text.encode()) for document in part) / 1e6:.2f} MB |"
        for name, part in parts.items()
    ]
    pairs = sum(1 for document in shown for _ in corpus.dialogues(document))
    return [
        "| | Files | Text |",
        "|---|---|---|",
        *rows,
        f"\nAn epoch shows the library {data.LIBRARY_REPEATS} times, its tests once, and {pairs:,} requests with their",
        f"replies once: {facts.epoch_tokens:,} tokens. Python {platform.python_version()}, PyTorch "
        f"{torch.__version__.split('+')[0]}; SHA-256 of the",
        f"corpus: `{corpus.digest(facts.documents)}`.\n",
    ]


def command(facts: Facts) -> str:
    last, run = facts.log[-1], facts.run
    sizes = f"--steps {last['step']:.0f} --batch {run.batch} --length {run.length}"
    return f"python tools/train_demo.py --seed {run.seed} {sizes}"


def clock(facts: Facts) -> str:
    if facts.run.minutes is None:
        return "The same seed, corpus and machine give the same run, up to the rounding of threads."
    return (
        f"The learning rate of this run followed the elapsed time (`--minutes {facts.run.minutes:g}`), which is\n"
        "another number of steps on another machine; with `--steps` it follows the step count, and seed and corpus\n"
        "determine the run."
    )


INTRODUCTION = """# The embedded demo

The package contains one tiny MPT, so that `monoblock generate` and `monoblock chat` work on a new machine
without a network. It was trained from scratch by `tools/train_demo.py`, with this library's `MptForCausalLM`,
on text that every Python installation has: the source of the standard library.

```
monoblock generate "def fibonacci(n):"
monoblock chat
```

`monoblock chat` adds the [chat adapter](training.md#example-the-demos-chat-adapter) to it. In Python it is a
folder like any other checkpoint:

```python
from monoblock import AutoTokenizer, MptForCausalLM, demo

tokenizer = AutoTokenizer.from_pretrained(demo.path())
model = MptForCausalLM.from_pretrained(demo.path())
```

`tools/train_demo.py` writes this page.
"""

CORPUS = """Every `.py` file of the standard library, sorted by name, that parses and is not a duplicate. Codec tables,
the help topics and test data are left out, as is any file with more digits, backslashes or non-ASCII
characters than code has. Test modules are truncated to whole statements within 60,000 characters. One file in
fifty, chosen by the SHA-256 of its name, is held out from the training of the weights and of the tokenizer.

For chat, functions and classes are extracted from the same files: the first sentence of the docstring is the
request, the code without it the reply; for top-level definitions without a docstring the first line is the
request.
"""

TRAINING = """## Training

Next-token loss on windows of one stream of files in random order; a window begins at the beginning of a line,
with its indentation, so that a window that begins with a word begins at column 0, like prompts. Muon for the
matrices of the blocks and AdamW for the embedding and the norms; linear warm-up over 100 steps, then linear
decay to zero; bfloat16 products with float32 weights. The weights were rounded to bfloat16 once, at the end;
the figures above are those of the rounded weights, in float32 arithmetic. To repeat the run:
"""

LIMITS = """## Limits

It was trained on some twenty megabytes of one style of code. It has learned Python's syntax, common names and
idioms and the style of the standard library; it does not know what a Fibonacci number is, and its output is
not meant to be run.

Use prompts without a line break at the end: a line break and the indentation after it are one token, and a
line break alone means that the next line begins at column 0.
"""
