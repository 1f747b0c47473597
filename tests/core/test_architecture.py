"""Dependencies between the package's layers, checked on the source: families are data, backends are family-agnostic."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from monoblock.families import FAMILIES, class_names

PACKAGE = Path(__file__).parents[2] / "src" / "monoblock"
BACKENDS = sorted((PACKAGE / "backends").rglob("*.py"))
# Modules that interpret an ArchSpec in each backend; the others load, save and generate, and read the config.
SPEC_MODULES = (
    "ops",
    "attention",
    "model",
    "heads",
    "cache",
    "inputs",
    "network",
    "patches",
    "layers",
    "documents",
)
NAMES = {"mpt", "mistral", "fuyu", "persimmon", "openai", "gpt", "gpt1", "gpt2", "neo", "mpnet"}


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def words(text: str) -> set[str]:
    """The words of a text, with identifiers split: `GPTNeoModel` and `gpt_neo` both contain gpt and neo."""
    split = re.sub(r"([a-z0-9])([A-Z])|([A-Z]+)([A-Z][a-z])", r"\1\3 \2\4", text)
    return set(re.findall(r"[a-z0-9]+", split.lower()))


def identifiers(tree: ast.AST) -> set[str]:
    """Every name that is read, bound, imported or an argument."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                found.add(word)
            case ast.ClassDef(name=word) | ast.FunctionDef(name=word):
                found.add(word)
            case ast.alias(name=word):
                found |= set(word.split("."))
            case _:
                pass
    return found


def without_constructors(tree: ast.Module) -> ast.Module:
    """Constructors of transformers' cache classes take a `config`; their other methods do not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [member for member in node.body if getattr(member, "name", "") != "__init__"] or [
                ast.Pass()
            ]
    return tree


@pytest.mark.parametrize("path", BACKENDS, ids=name)
def test_backends_name_no_family(path: Path) -> None:
    """In code, strings and comments."""
    text = path.read_text(encoding="utf-8")
    assert words(text) & NAMES == set()
    assert not [c for family in FAMILIES for c in class_names(family) if c in text]
    assert "model_type" not in text


@pytest.mark.parametrize("path", [path for path in BACKENDS if path.stem in SPEC_MODULES], ids=name)
def test_spec_modules_use_no_config(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.stem == "cache":
        tree = without_constructors(tree)
    assert "config" not in identifiers(tree)
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not imported & {"monoblock.config", "monoblock.families"}


FRAMEWORKS = {"pytorch": {"torch"}, "flax": {"jax", "flax"}, "tf": {"tensorflow", "keras"}, "xla": set[str]()}
ANY = {"torch", "jax", "flax", "tensorflow", "keras", "transformers"}


def import_time(tree: ast.Module) -> set[str]:
    """The top-level packages that are imported when a module is imported."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {module.partition(".")[0] for module in found}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name)
def test_frameworks_are_imported_by_their_backend_only(path: Path) -> None:
    area, *rest = path.relative_to(PACKAGE).parts
    own = rest[0] if area == "backends" and len(rest) > 1 else None
    text = path.read_text(encoding="utf-8")
    assert import_time(ast.parse(text)) & ANY <= (FRAMEWORKS[own] if own else set())
    if own:  # backends do not import each other, within functions neither
        others = FRAMEWORKS.keys() - {own} - ({"xla"} if own in ("flax", "tf") else set[str]())
        assert [other for other in others if f"monoblock.backends.{other}" in text] == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "families").glob("*.py")), ids=name)
def test_families_are_data(path: Path) -> None:
    """They import no framework and no backend, and compute nothing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    roots = {module.partition(".")[0] for module in imported}
    assert not roots & {"torch", "jax", "flax", "tensorflow", "keras", "numpy", "transformers"}
    assert not [module for module in imported if module.startswith("monoblock.backends")]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.MatMult | ast.While)]


# ---------------------------------------------------------------------------- import graph


def module_name(path: Path) -> str:
    parts = ("monoblock", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def type_checking_only(node: ast.AST) -> bool:
    """Whether the node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def run_time(node: ast.AST) -> Iterator[ast.AST]:
    """The node and its descendants, without `if TYPE_CHECKING:` blocks."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not type_checking_only(child):
            yield from run_time(child)


def imports(
    tree: ast.Module, modules: Collection[str], read: Callable[[ast.AST], Iterable[ast.AST]] = run_time
) -> set[str]:
    """The modules that a module imports at run time, within functions too, and by `import_module` with a constant name.
    With `read=ast.walk` also those under `if TYPE_CHECKING:`."""
    named: set[str] = set()
    for node in read(tree):
        match node:
            case ast.Import(names=names):
                named |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                named |= {f"{module}.{alias.name}" for alias in names}
            case ast.Call(
                func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]
            ):
                named.add(module)
            case _:
                pass
    found: set[str] = set()
    for name in named:
        while name and name not in modules:  # a name imported from a module
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
GRAPH = {module: imports(tree, MODULES) - {module} for module, tree in TREES.items()}


def reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """The modules that a module imports, transitively."""
    found: set[str] = set()
    rest = [*graph[start]]
    while rest:
        if (module := rest.pop()) not in found:
            found.add(module)
            rest += graph[module]
    return found


def cyclic(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules that import themselves transitively."""
    return sorted(module for module in graph if module in reached(graph, module))


def test_no_import_cycles() -> None:
    """At import time or within functions."""
    assert cyclic(GRAPH) == []


def test_no_import_cycles_for_type_checkers() -> None:
    graph = {module: imports(tree, MODULES, ast.walk) - {module} for module, tree in TREES.items()}
    assert cyclic(graph) == []


def test_checkpoint_does_not_depend_on_backends() -> None:
    for module, path in MODULES.items():
        if module.startswith("monoblock.checkpoint"):
            assert "monoblock.backends" not in path.read_text(encoding="utf-8"), module
            assert not {m for m in reached(GRAPH, module) if m.startswith("monoblock.backends")}, module


def test_helpers_of_this_file() -> None:
    assert words("class GPTNeoThing:") & NAMES == {"gpt", "neo"}
    assert words('if name == "openai-gpt"') & NAMES == {"openai", "gpt"}
    assert words("prompts of an attempt") & NAMES == set()
    assert "config" in identifiers(ast.parse("x = self.config.vocab_size"))
    assert "config" in identifiers(without_constructors(ast.parse("class A:\n def f(self, config): pass")))
    assert len(BACKENDS) > 8
    circle = {
        "a": "from b import x",
        "b": "def f():\n from p import c",
        "p.c": "if TYPE_CHECKING:\n import b\nimportlib.import_module('a')",
        "d": "if TYPE_CHECKING:\n import e",
        "e": "import d",
    }
    graph = {module: imports(ast.parse(text), circle) for module, text in circle.items()}
    assert cyclic(graph) == ["a", "b", "p.c"]
    assert reached(graph, "e") == {"d"}
    typed = {module: imports(ast.parse(text), circle, ast.walk) for module, text in circle.items()}
    assert cyclic(typed) == ["a", "b", "d", "e", "p.c"]
    assert "monoblock.spec" in reached(GRAPH, "monoblock.backends.pytorch.model")


# ---------------------------------------------------------------------------- docs/architecture.md

PAGE = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
GROUP_ROWS = re.findall(r"^\| (\w+) \| ((?:`[\w/.]+`(?:, )?)+) \| ([\w, -]+) \|$", PAGE, flags=re.MULTILINE)
TABLES = re.findall(r"^\| file in `([\w/]+)/` \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)


def group_of(module: str, groups: Mapping[str, str]) -> str | None:
    """The group of the import table with the longest path that contains the module."""
    path = module.replace(".", "/").removeprefix("monoblock/")
    found = [part for part in groups if path == part.removesuffix(".py") or f"{path}/".startswith(part)]
    return groups[max(found, key=len)] if found else None


def test_the_import_table_is_current() -> None:
    groups = {path: name for name, paths, _ in GROUP_ROWS for path in re.findall(r"`(.+?)`", paths)}
    found: dict[str | None, set[str]] = {name: set() for name, _, _ in GROUP_ROWS}
    for module, imported in GRAPH.items():
        if module != "monoblock":
            own = group_of(module, groups)
            assert own is not None, f"docs/architecture.md: no group has {module}"
            others = {group_of(other, groups) for other in imported} - {own, None}
            found[own] |= {other for other in others if other is not None}
    assert {name: ", ".join(sorted(found[name])) or "-" for name in found} == {n: i for n, _, i in GROUP_ROWS}


def has_function(path: Path, name: str) -> bool:
    """Whether a Python file defines the (qualified) name, or a C++ file a function of that name."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.search(rf"^[^/\n]*\b[\w>*]+\s+{name}\(", text, flags=re.MULTILINE) is not None
    scope: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        match = next((node for node in scope if isinstance(node, kinds) and node.name == part), None)
        if match is None:
            return False
        scope = match.body
    return True


def test_functions_of_the_page_exist() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|hpp|cpp)):([\w.]+)`", PAGE)) - {("file.py", "function")}
    assert len(named) > 25
    assert {(file, name) for file, name in named if not has_function(PACKAGE / file, name)} == set()


def test_files_of_the_page_exist() -> None:
    """Paths from the package or the repository; in the tables of one folder, names in that folder."""
    root = PACKAGE.parents[1]
    rest, missing = PAGE, set[str]()
    for folder, rows in TABLES:
        rest = rest.replace(rows, "")
        names = [
            name
            for row in rows.splitlines()
            for name in re.findall(r"`([\w/]+(?:\.py|/))`", row.split("|")[1])
        ]
        assert names
        missing |= {f"{folder}/{name}" for name in names if not (PACKAGE / folder / name).exists()}
    paths = set(re.findall(r"`((?:\w+/)+(?:[\w*]+\.\w+)?|\w+\.py)(?::[\w.]+)?`", rest)) - {"file.py"}
    assert len(TABLES) >= 3 and len(paths) > 40
    short = {"attention_cuda.py", "attention_flex.py", "namespace.py", "model.py"}
    missing |= {p for p in paths - short if not any([*PACKAGE.glob(p), *root.glob(p)])}
    assert missing == set()


def test_missing_functions_are_found() -> None:
    assert has_function(PACKAGE / "native" / "kernels.cpp", "mb_step")
    assert not has_function(PACKAGE / "native" / "kernels.cpp", "mb_stop")
    assert not has_function(PACKAGE / "config.py", "PretrainedConfig.to_speck")
    assert not has_function(PACKAGE / "config.py", "to_spec")
