"""What the JAX and the TensorFlow backends share stands once, in `backends/xla`."""

from __future__ import annotations

import re
from pathlib import Path

from monoblock.backends import xla

BACKENDS = Path(next(iter(xla.__path__))).parent
LONGEST = 15  # equal lines in a row; more of them are one function that was written twice
# Names by which code differs that does the same in both.
SPELLINGS = re.compile(r"\b(jnp|np|tf|jax|flax|JAX|Flax|TF|TensorFlow|Array|Tensor)\b")


def lines_of(text: str) -> list[str]:
    """The lines of code and docstrings without indentation and framework, blank ones and comments left out."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [SPELLINGS.sub("_", line) for line in lines if line and not line.startswith("#")]


def runs_of(lines: list[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many lines."""
    return {tuple(lines[i : i + length]) for i in range(len(lines) - length + 1)}


def test_no_long_run_of_lines_stands_in_both() -> None:
    sides = [
        {path: runs_of(lines_of(path.read_text(encoding="utf-8")), LONGEST + 1) for path in files}
        for files in (sorted((BACKENDS / name).rglob("*.py")) for name in ("flax", "tf"))
    ]
    assert all(len(side) > 15 for side in sides)
    shared = {
        f"{one.relative_to(BACKENDS)} and {other.relative_to(BACKENDS)}": "\n".join(min(both))
        for one, own in sides[0].items()
        for other, others in sides[1].items()
        if (both := own & others)
    }
    assert shared == {}


def test_both_take_what_is_shared() -> None:
    """Each shared module is imported by both backends, directly or through another shared one."""
    imported = {
        name: "\n".join(path.read_text(encoding="utf-8") for path in (BACKENDS / name).rglob("*.py"))
        for name in ("flax", "tf", "xla")
    }
    for path in sorted((BACKENDS / "xla").glob("[!_]*.py")):
        patterns = (f"backends.xla.{path.stem} import", rf"backends.xla import .*\b{path.stem}\b")
        users = {name for name, text in imported.items() if any(re.search(p, text) for p in patterns)}
        assert users >= {"flax", "tf"} or "xla" in users, path.stem


def test_runs_are_found_whatever_the_framework() -> None:
    ours = "import jax.numpy as jnp\n\ndef f(x: Array) -> Array:\n    # a comment\n    return jnp.tanh(x)\n"
    theirs = "import tensorflow as tf\ndef f(x: Tensor) -> Tensor:\n  return tf.tanh(x)\n"
    assert runs_of(lines_of(ours), 2) & runs_of(lines_of(theirs), 2)
    assert not runs_of(lines_of(ours), 3) & runs_of(lines_of(theirs), 3)
