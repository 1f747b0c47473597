"""Writes `src/monoblock/__init__.pyi`, the stub of the lazy public names. `--check`: only compare.

python tools/make_stubs.py [--check]
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

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
# The inputs of the Flax classes are NumPy or JAX arrays, or nested lists.
FLAX_TYPES = {
    "train": "bool",
    "output_attentions": "bool | None",
    "output_hidden_states": "bool | None",
    "return_dict": "bool | None",
    "logits_to_keep": "int",
}
HEAD = '''"""Static view of monoblock's public names; written by tools/make_stubs.py."""

from typing import Any

from torch import Tensor

from monoblock.backends.tf.main_layer import MainLayer
from monoblock import (
{packages}
)
from monoblock.outputs import (
{outputs}
)
'''


def stub() -> str:
    """The text of the stub file."""
    rows = {name: _row(name) for name in sorted(monoblock._CLASSES)}
    outputs = sorted({row.output for _, row in rows.values()})
    packages = "\n".join(f"    {name} as {name}," for name in monoblock._PACKAGES)
    parts = [HEAD.format(packages=packages, outputs="\n".join(f"    {name}," for name in outputs))]
    homes: dict[str, list[str]] = {}
    for name, home in monoblock._HOME.items():
        homes.setdefault(home, []).append(name)
    for home, names in sorted(homes.items()):
        parts.append(f"from {home} import (\n" + "".join(f"    {n} as {n},\n" for n in sorted(names)) + ")\n")
    parts.append("\n__version__: str\n\ndef extra_of(module: str | None) -> str | None: ...\n")
    parts += ["\n", *(_base(name) for names in monoblock._BASES_OF.values() for name in sorted(names))]
    for module in monoblock._MODELS:
        parts += [WRITERS[module](importlib.import_module(module), *row) for row in rows.values()]
    return "".join(parts)


def _base(name: str) -> str:
    prefix = next((prefix for prefix in ("Flax", "TF") if name.startswith(prefix)), "")
    parent = "MainLayer" if name.endswith("MainLayer") else f"{prefix}PreTrainedModel"
    return f"class {name}({parent}): ...\n"


def _row(name: str) -> tuple[Family, ModelClass]:
    family = families.family_of(name)
    assert family is not None, name
    return family, family.model_class(name)


def _torch_class(module: Any, family: Family, row: ModelClass) -> str:
    arguments = [_argument(name) for name in row.forward.split()]
    arguments += ["*", *(_argument(name) for name in module.extra_arguments(family, row))]
    return f"""
class {row.name}({families.FAMILIES[family.name][0]}{module.BASE}):
    config: {family.config.__name__}
    def __init__(self, config: {family.config.__name__}) -> None: ...
    def forward(
        self,
{_lines(arguments)}    ) -> {row.output} | tuple[Any, ...]: ...
    __call__ = forward
"""


def _flax_class(module: Any, family: Family, row: ModelClass) -> str:
    cls = module.make_class(module.PREFIX + row.name)
    _, *parameters = inspect.signature(cls.__call__).parameters.values()
    arguments = [f"{p.name}: {FLAX_TYPES.get(p.name, 'Any')} = {p.default!r}" for p in parameters]
    first = next(i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY)
    arguments.insert(first, "*")
    return f"""
class {cls.__name__}(Flax{families.FAMILIES[family.name][0]}PreTrainedModel):
    config: {family.config.__name__}
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
{_lines(arguments)}    ) -> {module.output_class(row.output).__name__} | tuple[Any, ...]: ...
"""


def _tf_class(module: Any, family: Family, row: ModelClass) -> str:
    cls = module.make_class(module.PREFIX + row.name)
    _, *parameters = inspect.signature(cls.call).parameters.values()
    arguments = [f"{p.name}: Any = None" for p in parameters]
    return f"""
class {cls.__name__}(TF{families.FAMILIES[family.name][0]}{module.BASE}):
    config: {family.config.__name__}
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
{_lines(arguments)}    ) -> TF{row.output} | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TF{row.output} | tuple[Any, ...]: ...
"""


def _lines(arguments: list[str]) -> str:
    return "".join(f"        {argument},\n" for argument in arguments)


def _argument(name: str) -> str:
    default = "0" if name == "logits_to_keep" else "None"
    return f"{name}: {TYPES.get(name, 'Tensor | None')} = {default}"


WRITERS = {
    "monoblock.backends.pytorch.classes": _torch_class,
    "monoblock.backends.flax.classes": _flax_class,
    "monoblock.backends.tf.classes": _tf_class,
}


def main() -> int:
    """Exit status: 0 written or up to date, 1 out of date."""
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
