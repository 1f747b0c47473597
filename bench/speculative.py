"""Speculation without a draft model against plain decoding: code, prose and random tokens, in one process.

    python bench/speculative.py [--model FOLDER] [--dtype float32] [--quantize int8] [--new 256] [--runs 5]
                                [--threads 1] [--rows 4] [--processor-time]

The methods alternate: plain decoding, prompt lookup with drafts of 10 tokens (n-grams of 3), and
`speculation="suffix"`. All give the same tokens, which is checked; the ratios are those of the least times. With
`--processor-time` they are seconds of this process's processor (and so are those of the rule for drafts), for a machine
with other work; use one thread with it, since waiting threads count.

- "own": the embedded demo continues code by itself (only without --model).
- "replay": a logits processor makes the model write a given text, so that the share of accepted drafts is that of real
  text whatever the weights. An edit: the prompt has a module of this repository, the output is the module with a name
  and some lines changed. Chat: both are prose of the documentation. Random: uniform token ids.
- "engine": the replayed texts as requests of the serving engine, `--rows` at a time, and the same requests again, which
  are then in the index of finished requests.

`--runs 0` and `--rows 0` leave out `generate` and the engine. Texts are tokenized by the demo's tokenizer, so a model
of `bench/shapes.py` with random weights will do.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {
    "getters": '''class Point:
    def get_x(self):
        """Return x."""
        return self.x

    def get_y(self):
        """Return y."""
        return self.y

    def get_z(self):
''',
    "tests": """import unittest

class TestNames(unittest.TestCase):
    def test_first(self):
        self.assertEqual(first([1, 2]), 1)
        self.assertEqual(first([3]), 3)

    def test_second(self):
        self.assertEqual(second([1, 2]), 2)
""",
    "parser": """def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", type=str, default=None, help="the name")
    parser.add_argument("--size", type=int, default=None, help="the size")
    parser.add_argument(""",
    "branches": """def kind(value):
    if isinstance(value, int):
        return "int"
    elif isinstance(value, str):
        return "str"
    elif isinstance(value,""",
    "free": "def fibonacci(n):",
}
LOOKUP = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}
METHODS: dict[str, dict[str, Any]] = {"plain": {}, "lookup": LOOKUP, "suffix": {"speculation": "suffix"}}
ENGINE: dict[str, dict[str, Any]] = {
    "plain": {},
    "lookup": {"speculative_tokens": 10},
    "suffix": {"speculation": "suffix"},
}


def edit(text: str) -> str:
    """The text with another name of its most frequent long word, and every twelfth line changed."""
    words = [
        word
        for word in text.replace("(", " ").replace(".", " ").split()
        if len(word) > 5 and word.isidentifier()
    ]
    name = max(sorted(set(words)), key=words.count)
    lines = text.replace(name, f"{name}_of").splitlines(keepends=True)
    return "".join(
        f"{line[:-1]}  # checked\n" if number % 12 == 11 else line for number, line in enumerate(lines)
    )


def texts(tokenizer: Any, new: int, seed: int = 0) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and output of each kind."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    code = (ROOT / "src/monoblock/generation/streamers.py").read_text(encoding="utf-8")
    code = code[code.index("class ") :][: 3 * new]
    prose = ids((ROOT / "docs/serving.md").read_text(encoding="utf-8")[: 12 * new])
    rng = random.Random(seed)
    drawn = [rng.randrange(10, 500) for _ in range(2 * new)]
    return {
        "code edit": (ids(code), ids(edit(code))[:new]),
        "chat": (prose[:new], prose[new : 2 * new]),
        "random": (drawn[:new], drawn[new:]),
    }


class Replay:
    """A logits processor that makes the model write a text."""

    def __init__(self, prompt: list[int], output: list[int]) -> None:
        self.start, self.output = len(prompt), output

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Scores (rows, vocabulary) of which the next token of the text is the largest."""
        scores[:, self.output[ids.shape[1] - self.start]] = 1e9
        return scores


clock = time.perf_counter


def alternate(runs: int, calls: dict[str, Callable[[], list[Any]]]) -> dict[str, float]:
    """The least seconds of each call; their results must be equal."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        found: dict[str, list[Any]] = {}
        for name, call in calls.items():
            start = clock()
            found[name] = call()
            took[name].append(clock() - start)
        for name, value in found.items():
            if value != found["plain"]:
                raise SystemExit(f"{name} changed the tokens")
    return {name: min(values) for name, values in took.items()}


def row(part: str, name: str, tokens: int, took: dict[str, float]) -> None:
    """Print a line of the table."""
    plain = took["plain"]
    print(
        f"| {part} | {name} | {tokens / plain:.0f} | {plain / took['lookup']:.2f} | {plain / took['suffix']:.2f} |",
        flush=True,
    )


def engine_part(model: Any, tokenizer: Any, given: dict[str, Any], args: argparse.Namespace) -> None:
    """Requests on an engine: rows of one kind, then of all kinds, then the same again."""
    from monoblock import SamplingParams
    from monoblock.serving.engine.loading import make_engine
    from monoblock.serving.engine.options import EngineOptions

    kinds = [*given]
    sets = {name: [name] * args.rows for name in kinds}
    sets["all kinds"] = [kinds[row % len(kinds)] for row in range(args.rows)]

    def requests(core: Any, names: list[str], more: dict[str, Any]) -> list[Any]:
        tokens: list[list[int]] = [[] for _ in names]
        for at, name in enumerate(names):
            prompt, output = given[name]
            # Other ids in each row, so that rows do not repeat each other.
            prompt, output = ([(token + 97 * at) % 4096 for token in ids] for ids in (prompt, output))
            params = SamplingParams(
                temperature=0,
                max_tokens=len(output),
                ignore_eos=True,
                logits_processors=[Replay(prompt, output)],
                **more,
            )
            core.add(prompt, params, sink=lambda delta, at=at: tokens[at].extend(delta.tokens))
        while core.step():
            pass
        return tokens

    def make() -> Any:
        return make_engine(model, tokenizer, options=EngineOptions(cache_memory=args.cache << 20))

    for name, names in sets.items():
        cores = {method: make() for method in ENGINE}
        calls = {
            m: (lambda core=cores[m], m=m, names=names: requests(core, names, ENGINE[m])) for m in ENGINE
        }
        total = sum(len(given[kind][1]) for kind in names)
        row(f"engine, {args.rows} rows", name, total, alternate(1, calls))
        row(f"engine, {args.rows} rows", f"{name}, again", total, alternate(1, calls))


def main() -> None:
    """Times the methods on every text, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder; default: the embedded demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize")
    for name, default in {"new": 256, "runs": 5, "threads": 1, "rows": 4, "cache": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    if args.processor_time:
        global clock
        clock = time.process_time
        from monoblock.generation import draft_rule

        draft_rule.clock = clock

    import torch

    from monoblock import AutoModelForCausalLM, AutoTokenizer, demo

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    more = {"quantization_config": args.quantize} if args.quantize else {}
    model = AutoModelForCausalLM.from_pretrained(args.model or demo.path(), dtype=args.dtype, **more)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    print(
        f"{args.model or 'demo'}, {args.quantize or args.dtype}, {args.threads} threads, torch {torch.__version__}"
    )
    print("| part | text | plain tok/s | lookup / plain | suffix / plain |\n|---|---|---|---|---|")

    def generate(ids: list[int], new: int, **given: Any) -> list[int]:
        prompt = torch.tensor([ids])
        found = model.generate(
            prompt, max_new_tokens=new, attention_mask=torch.ones_like(prompt), **options, **given
        )
        return found[0].tolist()

    if args.model is None and args.runs:
        for name, text in PROMPTS.items():
            ids = list(tokenizer(text)["input_ids"])
            calls = {m: (lambda m=m, ids=ids: generate(ids, args.new, **METHODS[m])) for m in METHODS}
            row("own", name, args.new, alternate(args.runs + 1, calls))
    given = texts(tokenizer, args.new)
    for name, (prompt, output) in given.items() if args.runs else ():
        replay = Replay(prompt, output)
        calls = {
            m: (
                lambda m=m, prompt=prompt, output=output, replay=replay: generate(
                    prompt, len(output), logits_processor=[replay], **METHODS[m]
                )
            )
            for m in METHODS
        }
        row("replay", name, len(output), alternate(args.runs, calls))
    if args.rows:
        engine_part(model, tokenizer, given, args)


if __name__ == "__main__":
    main()
