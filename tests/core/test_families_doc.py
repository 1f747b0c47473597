"""docs/families.md: its tables are current, and every class and option that it names exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from monoblock.families import FAMILIES, class_names, family

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def tool() -> Any:
    file = ROOT / "tools" / "make_family_table.py"
    spec = importlib.util.spec_from_file_location("make_family_table", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(model_type: str) -> str:
    title = tool().TITLES[model_type]
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_tables_are_current() -> None:
    assert tool().updated(TEXT) == TEXT, "run: python tools/make_family_table.py"


def test_the_table_agrees_with_the_papers() -> None:
    """Some cells, written by hand from the papers."""
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in tool().table().splitlines()}
    columns = list(FAMILIES)
    cells = {
        axis: dict(zip(columns, (cell.strip(" |") for cell in row), strict=False))
        for axis, row in rows.items()
    }
    assert cells["norm"]["openai-gpt"] == "layer norm, post"
    assert cells["norm"]["mpt"] == "layer norm without bias, pre"
    assert cells["positions"]["fuyu"] == "RoPE, theta 25000, on 0.5 of each head"
    assert cells["attention"]["gpt_neo"] == "per layer: causal; causal, window 256"
    assert cells["attention"]["mpnet"] == "bidirectional"
    assert cells["score scale"]["gpt_neo"] == "1"
    assert cells["key/value heads"]["mistral"] == "8 for 32 heads"
    assert cells["biases"]["gpt_neo"] == "output, MLP"
    assert cells["LM head"]["mistral"] == "untied"
    assert cells["q, k, v in files"]["openai-gpt"] == "fused, transposed"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_a_section(model_type: str) -> None:
    text = section(model_type)
    assert "```python" in text
    assert "Unlike transformers" in text
    assert not [name for name in class_names(model_type) if f"`{name}`" not in text]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_options_of_note_are_config_fields(model_type: str) -> None:
    options = re.search(r"Options of note: (.*?)\n\n", section(model_type), re.DOTALL)
    assert options
    config = family(model_type).config
    nested = {field for kind in config.sub_configs.values() for field in kind.fields}
    known = {*config.fields, *config.attribute_map, *nested, "tie_word_embeddings", "token_type_ids"}
    values = {
        "linear",
        "dynamic",
        "yarn",
        "llama3",
        "gelu",
        "gelu_new",
        "cls_index",
        "last",
        "first",
        "mean",
        "tanh",
    }
    values |= {"MPTForCausalLM", "text_config", "sliding_attention", "full_attention"}
    named = set(re.findall(r"`([A-Za-z_0-9]+)(?:=[^`]*)?`", options[1]))
    assert named - known - values == set()
