"""Write `src/monoblock/__init__.pyi`, the static view of the lazy public names. `--check`: only compare.

python tools/make_stubs.py [--check]
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import monoblock
from monoblock import families
from monoblock.families import Family, ModelClass

STUB = Path(__file__).resolve().parents[1] / "src" / "monoblock" / "__init__.pyi"
TYPES = {
    "past_key_values": "Cache | tuple[tuple[Tensor, Tensor], ...] | None",
    "use_cache": "bool | None",
    "output_attentions": "bool | None",
    "output_hidden_states": "bool | None",
    "return_dict": "bool | None",
    "logits_to_keep": "int | Tensor",
    "num_items_in_batch": "Tensor | int | None",
}
HEAD = '''"""Static view of monoblock's public names; written by tools/make_stubs.py."""

from typing import Any

from torch import Tensor

from monoblock.outputs import (
{outputs}
)
'''


def stub() -> str:
    """The text of the stub file."""
    models = [name for names in monoblock._MODELS.values() for name in names]
    rows = {name: _row(name) for name in sorted(models)}
    outputs = sorted({row.output for _, row in rows.values()})
    parts = [HEAD.format(outputs="\n".join(f"    {name}," for name in outputs))]
    homes: dict[str, list[str]] = {}
    for name, home in monoblock._HOME.items():
        homes.setdefault(home, []).append(name)
    for home, names in sorted(homes.items()):
        parts.append(f"from {home} import (\n" + "".join(f"    {n} as {n},\n" for n in sorted(names)) + ")\n")
    parts.append("\n__version__: str\n")
    parts += [_class(family, row) for family, row in rows.values()]
    return "".join(parts)


def _row(name: str) -> tuple[Family, ModelClass]:
    family = families.family_of(name)
    assert family is not None, name
    return family, family.model_class(name)


def _class(family: Family, row: ModelClass) -> str:
    extra = importlib.import_module("monoblock.backends.pytorch.classes").extra_arguments(family, row)
    names = row.forward.split()
    arguments = [_argument(name) for name in names]
    arguments += ["*", *(_argument(name) for name in extra)]
    lines = "".join(f"        {argument},\n" for argument in arguments)
    return f"""
class {row.name}(PreTrainedModel):
    config: {family.config.__name__}
    def __init__(self, config: {family.config.__name__}) -> None: ...
    def forward(
        self,
{lines}    ) -> {row.output} | tuple[Any, ...]: ...
    __call__ = forward
"""


def _argument(name: str) -> str:
    default = "0" if name == "logits_to_keep" else "None"
    return f"{name}: {TYPES.get(name, 'Tensor | None')} = {default}"


def main() -> int:
    """0: written, or up to date; 1: out of date."""
    text = stub()
    if "--check" in sys.argv[1:]:
        if STUB.read_text(encoding="utf-8") == text:
            return 0
        print(f"{STUB.name} is out of date: run python tools/make_stubs.py")
        return 1
    STUB.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
