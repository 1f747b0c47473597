"""Code shared by the JAX and TensorFlow backends is in `backends/xla`, without duplicates."""

from __future__ import annotations

import re
from pathlib import Path

from monoblock.backends import xla

BACKENDS = Path(next(iter(xla.__path__))).parent
LONGEST = 15  # limit on consecutive equal lines
# Names that differ between equivalent code of the two backends.
SPELLINGS = re.compile(r"\b(jnp|np|tf|jax|flax|JAX|Flax|TF|TensorFlow|Array|Tensor)\b")


def lines_of(text: str) -> list[str]:
    """The lines without indentation, framework names, blank lines and comments."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [SPELLINGS.sub("_", line) for line in lines if line and not line.startswith("#")]


def runs_of(lines: list[str], length: int) -> set[tuple[str, ...]]:
    """All sequences of `length` consecutive lines."""
    return {tuple(lines[i : i + length]) for i in range(len(lines) - length + 1)}


def test_the_backends_share_no_long_sequence_of_lines() -> None:
    backends = [
        {path: runs_of(lines_of(path.read_text(encoding="utf-8")), LONGEST + 1) for path in files}
        for files in (sorted((BACKENDS / name).rglob("*.py")) for name in ("flax", "tf"))
    ]
    assert all(len(files_of_backend) > 15 for files_of_backend in backends)
    shared = {
        f"{one.relative_to(BACKENDS)} and {other.relative_to(BACKENDS)}": "\n".join(min(both))
        for one, own in backends[0].items()
        for other, others in backends[1].items()
        if (both := own & others)
    }
    assert shared == {}


def test_both_backends_use_every_shared_module() -> None:
    """Directly or through another shared module."""
    imported = {
        name: "\n".join(path.read_text(encoding="utf-8") for path in (BACKENDS / name).rglob("*.py"))
        for name in ("flax", "tf", "xla")
    }
    for path in sorted((BACKENDS / "xla").glob("[!_]*.py")):
        patterns = (f"backends.xla.{path.stem} import", rf"backends.xla import .*\b{path.stem}\b")
        users = {name for name, text in imported.items() if any(re.search(p, text) for p in patterns)}
        assert users >= {"flax", "tf"} or "xla" in users, path.stem


def test_equal_lines_are_found_across_frameworks() -> None:
    ours = "import jax.numpy as jnp\n\ndef f(x: Array) -> Array:\n    # a comment\n    return jnp.tanh(x)\n"
    theirs = "import tensorflow as tf\ndef f(x: Tensor) -> Tensor:\n  return tf.tanh(x)\n"
    assert runs_of(lines_of(ours), 2) & runs_of(lines_of(theirs), 2)
    assert not runs_of(lines_of(ours), 3) & runs_of(lines_of(theirs), 3)
