"""Writes the table of model classes in README.md from the families' registry: `python tools/support_table.py`."""

from __future__ import annotations

from pathlib import Path

import monoblock
from monoblock.families import class_names

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by tools/support_table.py -->\n", "<!-- end -->\n"

# model_type -> the family's name, in the order of the table.
TITLES = {
    "mpt": "MPT",
    "mistral": "Mistral",
    "fuyu": "Fuyu",
    "openai-gpt": "OpenAI GPT (GPT-1)",
    "gpt_neo": "GPT Neo",
    "mpnet": "MPNet",
}
PREFIXES = ("", "Flax", "TF")  # of the class names on PyTorch, JAX and TensorFlow


def table() -> str:
    """A row for each family: its title and its PyTorch classes."""
    lines = ["| family | classes |", "|---|---|"]
    lines += [f"| {title} | {_classes(model_type)} |" for model_type, title in TITLES.items()]
    return "\n".join(lines) + "\n"


def _classes(model_type: str) -> str:
    """The names of a family's classes, which every framework must have."""
    public, names = dir(monoblock), class_names(model_type)
    assert all(prefix + name in public for name in names for prefix in PREFIXES), model_type
    return ", ".join(f"`{name}`" for name in names)


def updated(text: str) -> str:
    """The text of README.md with a current table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
