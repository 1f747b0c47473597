"""Mutation test: changes the sources by one expression at a time and checks that a test fails.

    python tools/mutate.py [--count 200] [--seed 0] [--only FILE] [--jobs N] [--report FILE]

Each mutant changes one expression of the spec, the families, the model, the caches or the logits processors: an
operator becomes another, a term or a factor goes, a condition is inverted, a number is one more, a keyword argument
(a field of the spec) is left out. The tests of `TARGETS` then run in a child process until one fails. A mutant that no
test notices has survived; mutants in `EQUIVALENT` change nothing that a caller can observe, each with its reason.

The last lines are a table of the mutants caught. Exit status 1: fewer than 95% are caught.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "monoblock"
SHARE = 0.95  # of the mutants that the tests must catch
# Times the CPU time of the tests without a mutant: one that takes more is caught, since it does not end.
PATIENCE = 5

# Group -> files below src/monoblock, and the tests that prove them, the quickest first.
MODEL_TESTS = (
    "tests/core/test_spec.py",
    "tests/torch/test_sensitivity.py",
    "tests/parity/test_families.py",
    "tests/parity/test_mpt.py",
    "tests/torch/test_families_cache.py",
    "tests/parity/test_padding.py",
    "tests/torch/test_documents.py",
    "tests/torch/test_attention_kernels.py",
    "tests/torch/test_tree.py",
    "tests/torch/test_generation_torch.py",
    "tests/parity/test_ministral.py",
    "tests/torch/test_wrong_inputs.py",
)
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "spec": (
        ("spec.py", "heads.py"),
        ("tests/core/test_spec.py", "tests/core/test_config_fields.py", *MODEL_TESTS),
    ),
    "families": (
        ("families/*.py",),
        (
            "tests/core/test_config_fields.py",
            "tests/parity/test_mpt_config.py",
            *MODEL_TESTS,
            "tests/parity/test_fuyu.py",
        ),
    ),
    "model": (
        tuple(f"backends/pytorch/{name}.py" for name in ("model", "ops", "layers", "heads", "inputs")),
        (*MODEL_TESTS, "tests/parity/test_mpt_losses.py", "tests/torch/test_transforms.py"),
    ),
    "cache": (
        ("backends/pytorch/cache.py", "backends/pytorch/generation/quantized_cache.py"),
        ("tests/torch/test_families_cache.py", "tests/torch/test_quantized_cache.py", *MODEL_TESTS),
    ),
    "processors": (
        (
            "generation/processors.py",
            "generation/scores.py",
            "generation/stopping.py",
            "generation/guidance.py",
        ),
        (
            "tests/core/test_generation_scores.py",
            "tests/core/test_generation_stopping.py",
            "tests/core/test_guidance.py",
            "tests/core/test_generation_config.py",
            "tests/core/test_generation_loop.py",
            "tests/torch/test_generation_torch.py",
            "tests/parity/test_guidance_parity.py",
        ),
    ),
}

# "file: old -> new" -> why no test could tell the mutant from the original.
EQUIVALENT: dict[str, str] = {}

# Parts of a statement that are not computed when the program runs, or only as it is imported.
SKIPPED = ("annotation", "returns", "decorator_list", "type_params", "bases")

SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    group: str
    path: Path
    line: int
    old: str
    new: str
    number: int  # which of the file's changes it is

    def source(self) -> str:
        """The whole file with the change."""
        tree = ast.parse(self.path.read_text())
        for number, (parent, field, index, _, changed) in enumerate(_alternatives(tree)):
            if number == self.number:
                _put(parent, field, index, changed)
                return ast.unparse(ast.fix_missing_locations(tree))
        raise ValueError(f"{self.path} has no change {self.number}")

    @property
    def name(self) -> str:
        return f"{self.path.relative_to(SOURCES)}: {self.old} -> {self.new}"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Replacements of this node."""
    match node:
        case ast.BinOp(left=left, op=op) if type(op) in SWAPPED and not _is_text(node):
            swapped = copy.deepcopy(node)
            swapped.op = SWAPPED[type(op)]()
            yield swapped
            yield copy.deepcopy(left)
        case ast.Compare(ops=[op]) if type(op) in SWAPPED:
            swapped = copy.deepcopy(node)
            swapped.ops = [SWAPPED[type(op)]()]
            yield swapped
        case ast.BoolOp(op=op, values=values):
            swapped = copy.deepcopy(node)
            swapped.op = SWAPPED[type(op)]()
            yield swapped
            yield copy.deepcopy(values[0])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield copy.deepcopy(operand)
        case ast.IfExp(body=body, orelse=orelse):
            yield copy.deepcopy(body)
            yield copy.deepcopy(orelse)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Call(keywords=keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg is not None:
                    dropped = copy.deepcopy(node)
                    del dropped.keywords[i]
                    yield dropped
        case _:
            return


def _is_text(node: ast.BinOp) -> bool:
    """Joins strings: what an error says, mostly."""
    return any(
        isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in (node.left, node.right)
    )


def expressions(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Each expression that may change, as (parent, field, index, node): none in annotations, decorators, base classes,
    messages, `raise`, `assert` and `TYPE_CHECKING`."""
    for parent in _reached(tree):
        for field, value in ast.iter_fields(parent):
            if field in SKIPPED:
                continue
            if isinstance(value, list):
                for i, node in enumerate(value):
                    if isinstance(node, ast.expr | ast.keyword):
                        yield parent, field, i, node
            elif isinstance(value, ast.expr):
                yield parent, field, None, value


def _reached(node: ast.AST) -> Iterator[ast.AST]:
    skipped = isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)
    if skipped or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field in SKIPPED:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _reached(child)


def mutants_of(path: Path, group: str) -> list[Mutant]:
    """Every mutant of a file."""
    return [
        Mutant(group, path, getattr(node, "lineno", 0), ast.unparse(node), ast.unparse(changed), number)
        for number, (_, _, _, node, changed) in enumerate(_alternatives(ast.parse(path.read_text())))
    ]


def _alternatives(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, ast.AST]]:
    """(parent, field, index, node, replacement) for each change, in a fixed order."""
    for parent, field, index, node in expressions(tree):
        for changed in changes(node):
            yield parent, field, index, node, changed


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def chosen(count: int, seed: int, only: str | None) -> list[Mutant]:
    """So many mutants, of all groups alike, drawn by the seed."""
    rng = random.Random(seed)
    groups: list[list[Mutant]] = []
    for group, (patterns, _) in TARGETS.items():
        files = [path for pattern in patterns for path in sorted(SOURCES.glob(pattern))]
        if missing := [pattern for pattern in patterns if not list(SOURCES.glob(pattern))]:
            sys.exit(f"no file is named {missing[0]}: correct TARGETS")
        mutants = [
            m
            for path in files
            if only is None or str(path).endswith(only)
            for m in mutants_of(path, group)
            if m.name not in EQUIVALENT
        ]
        rng.shuffle(mutants)
        groups.append(mutants)
    drawn: list[Mutant] = []
    while len(drawn) < count and any(groups):
        for group in groups:
            if group and len(drawn) < count:
                drawn.append(group.pop())
    return drawn


def passes(group: str, seconds: int, mutant: Mutant | None = None) -> bool:
    """Whether all tests of a group pass within that CPU time, with the mutant if there is one.

    They run in a child of this process, which has imported the frameworks already.
    """
    with tempfile.TemporaryDirectory() as name:
        return _passes(TARGETS[group][1], seconds, mutant, Path(name))


def _passes(tests: tuple[str, ...], seconds: int, mutant: Mutant | None, folder: Path) -> bool:
    source = folder / "src"
    shutil.copytree(SOURCES, source / "monoblock", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        (source / "monoblock" / mutant.path.relative_to(SOURCES)).write_text(mutant.source())
    child = os.fork()
    if child == 0:
        _run_tests(source, folder, tests, seconds)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _run_tests(source: Path, folder: Path, tests: tuple[str, ...], seconds: int) -> None:
    """In the child: pytest with the mutant's sources in front. Ends the process, also after `seconds` of CPU time."""
    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(20 * seconds)  # for a mutant that waits forever
        nowhere = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.path.insert(0, str(source))
        os.environ["PYTHONPATH"] = str(source)
        os.chdir(ROOT)
        import pytest

        status = int(
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", *tests])
        )
    finally:
        os._exit(status)


def _cpu_of_children() -> float:
    """The CPU time in seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="mutants of this file only")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", type=Path, help="a file for the survivors")
    arguments = parser.parse_args()
    for name in ("numpy", "pytest", "hypothesis", "torch", "transformers", "tokenizers"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    mutants = chosen(arguments.count, arguments.seed, arguments.only)
    survivors: list[Mutant] = []
    limits: dict[str, int] = {}
    for group in dict.fromkeys(mutant.group for mutant in mutants):
        start = _cpu_of_children()
        if not passes(group, 3600):
            sys.exit(f"the tests of {group} fail without any mutant")
        took = _cpu_of_children() - start
        limits[group] = 60 + round(PATIENCE * took)
        print(f"{group}: {took:.0f} s of CPU time without a mutant", flush=True)

    def tried(number: int) -> None:
        mutant = mutants[number]
        alive = passes(mutant.group, limits[mutant.group], mutant)
        if alive:
            survivors.append(mutant)
        word = "SURVIVED" if alive else "caught"
        print(f"{number + 1}/{len(mutants)} {word}: {mutant.name} (line {mutant.line})", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(tried, range(len(mutants))))
    if arguments.report:
        arguments.report.write_text("".join(f"{m.name} (line {m.line})\n" for m in survivors))
    print("| part | mutants | caught |\n|---|---|---|")
    for group in TARGETS:
        total = sum(m.group == group for m in mutants)
        alive = sum(m.group == group for m in survivors)
        print(f"| {group} | {total} | {total - alive} |")
    caught = len(mutants) - len(survivors)
    print(f"| all | {len(mutants)} | {caught} ({caught / max(len(mutants), 1):.1%}) |")
    return int(caught < SHARE * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
