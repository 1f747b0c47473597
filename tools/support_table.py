"""Writes README's table of what works today, from the registry: `python tools/support_table.py`."""

from __future__ import annotations

from pathlib import Path

import monoblock
from monoblock.families import FAMILIES, class_names

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by tools/support_table.py -->\n", "<!-- end -->\n"

# model_type -> the family's name; in the order in which they came to the project.
TITLES = {
    "mpt": "MPT",
    "mistral": "Mistral",
    "fuyu": "Fuyu",
    "openai-gpt": "OpenAI GPT (GPT-1)",
    "gpt_neo": "GPT Neo",
    "mpnet": "MPNet",
}
FRAMEWORKS = {"PyTorch": "", "JAX": "Flax", "TensorFlow": "TF"}  # and what class names start with
HEADS = {
    "Model": "bare",
    "ForCausalLM": "causal LM",
    "LMHeadModel": "causal LM",
    "ForMaskedLM": "masked LM",
    "DoubleHeadsModel": "double heads",
    "ForMultipleChoice": "multiple choice",
    "ForSequenceClassification": "sequence classification",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
}


def table() -> str:
    """A row for each family, a column for each framework; a cell lists the heads whose classes are public."""
    lines = ["| family | " + " | ".join(FRAMEWORKS) + " |", "|---" * (1 + len(FRAMEWORKS)) + "|"]
    for model_type, title in TITLES.items():
        cells = (_cell(model_type, prefix) for prefix in FRAMEWORKS.values())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(model_type: str, prefix: str) -> str:
    if model_type not in FAMILIES:
        return "planned"
    stem = FAMILIES[model_type][0]
    names = [name for name in class_names(model_type) if prefix + name in dir(monoblock)]
    return ", ".join(HEADS[name.removeprefix(stem)] for name in names) or "planned"


def updated(text: str) -> str:
    """A README's text with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
