"""Prompt lookup decoding against plain decoding, with the embedded demo on code that repeats parts of the prompt.

    python bench/speculative.py [--new 128] [--runs 5] [--draft 10] [--ngram 3] [--threads 1]

Both generate the same tokens, which is checked. They alternate within one process; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

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


def main() -> None:
    """Times both on every prompt, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"new": 128, "runs": 5, "draft": 10, "ngram": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    import torch

    from monoblock import AutoTokenizer, MptForCausalLM, demo

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    model = MptForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    lookup = {"prompt_lookup_num_tokens": args.draft, "max_matching_ngram_size": args.ngram}
    methods = {"plain": {}, "lookup": lookup}
    print(
        f"{args.new} tokens, {args.threads} threads, torch {torch.__version__}, medians of {args.runs} runs"
    )
    print("| prompt | plain tok/s | lookup tok/s | lookup / plain |\n|---|---|---|---|")
    ratios: list[float] = []
    for name, text in PROMPTS.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": args.new, "do_sample": False, "eos_token_id": None}
        took: dict[str, list[float]] = {method: [] for method in methods}
        outputs: dict[str, list[int]] = {}
        for _ in range(args.runs + 1):
            for method, more in methods.items():
                start = time.perf_counter()
                outputs[method] = model.generate(ids, **options, **more)[0].tolist()
                took[method].append(time.perf_counter() - start)
        if outputs["plain"] != outputs["lookup"]:
            raise SystemExit(f"{name}: prompt lookup changed the tokens")
        # The first run of each is a warm-up.
        plain, lookup_speed = (args.new / statistics.median(took[method][1:]) for method in methods)
        ratios.append(lookup_speed / plain)
        print(f"| {name} | {plain:.0f} | {lookup_speed:.0f} | {lookup_speed / plain:.2f} |")
    print(f"| median of prompts | | | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
