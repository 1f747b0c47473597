"""The corpus of the embedded search model: the documented code of the running Python's standard library.

`definitions()` returns functions, methods and classes with a docstring, by module; `training_pairs()` and
`held_out_pairs()` make the records of `monoblock finetune --task embedding` from them; `entries()` returns the texts of
the index. Modules, not functions, are divided between training and evaluation. The results do not depend on time,
locale or hash seeds.
"""

import ast
import hashlib
import importlib
import inspect
import io
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import demo_corpus as corpus

HELD_OUT = 10  # one family of modules in so many
DOCUMENTATION, CODE, ENTRY = 320, 480, 150  # characters of a text
COPIES = 2  # with other lines and words left out, of each pair of a definition
NAMED = {"library": 2, "tests": 6}  # of the functions without documentation, one in so many is trained on
# Modules that act when imported, or that are no library.
NOT_IMPORTED = {
    "antigravity",
    "this",
    "idlelib",
    "turtledemo",
    "test",
    "lib2to3",
    "pydoc_data",
    "turtle",
    "posix",
    "curses",
}
PUBLIC_NAMES = {"posixpath": "os.path"}
NOT_INDEXED = re.compile(
    r"^(idlelib|lib2to3|turtledemo|pydoc_data|test|ensurepip|ntpath|distutils|turtle|tkinter|curses)\b"
)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A documented function, method or class of a source file."""

    module: str
    name: str  # within the module: "DictReader.fieldnames"
    signature: str
    documentation: str
    code: str  # without the docstring

    @property
    def held_out(self) -> bool:
        """Whether the definition is for evaluation only."""
        return is_held_out(self.module)

    @property
    def title(self) -> str:
        """The full name with the arguments."""
        return f"{self.module}.{self.name}{self.signature}"


def is_held_out(module: str) -> bool:
    """Whether a module's family is held out, by a hash of its name; `_pydecimal` and `decimal` are one family."""
    family = re.sub(r"^_?(py(?=[a-z]))?|^_", "", module.split(".")[0])
    if module.startswith("_py"):
        family = module.removeprefix("_py").split(".")[0]
    return int.from_bytes(hashlib.sha256(family.encode()).digest()[:4], "big") % HELD_OUT == 0


def definitions(documents: Iterable[corpus.Document] | None = None) -> list[Definition]:
    """The documented definitions of the library's sources without its tests, each documentation once."""
    found: list[Definition] = []
    known: set[str] = set()
    for document in corpus.collect() if documents is None else documents:
        if document.is_test:
            continue
        module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for definition in _definitions(module, document.text):
            if definition.documentation not in known:
                known.add(definition.documentation)
                found.append(definition)
    return found


def _definitions(module: str, text: str) -> Iterator[Definition]:
    lines = text.split("\n")

    def visit(node: ast.AST, prefix: str) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                docstring = ast.get_docstring(child)
                documentation = shortened(docstring, DOCUMENTATION) if docstring else ""
                if len(documentation) >= 20 and " " in documentation:
                    yield Definition(
                        module=module,
                        name=name,
                        signature=_signature(child),
                        documentation=documentation,
                        code=_code(child, lines),
                    )
                yield from visit(child, f"{name}.")
            elif isinstance(child, ast.If | ast.Try | ast.With):
                yield from visit(child, prefix)

    yield from visit(ast.parse(text), "")


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({ast.unparse(node.args)})"
    return ""


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: Sequence[str]) -> str:
    """The definition without its docstring, at column 0, as far as CODE characters."""
    body = node.body[0]
    return _stripped(
        lines[node.lineno - 1 : body.lineno - 1] + lines[body.end_lineno or body.lineno : node.end_lineno],
        CODE,
    )


def _stripped(lines: Sequence[str], most: int) -> str:
    """Lines without indentation and blank ones, as far as `most` characters."""
    text = "\n".join(line.strip() for line in lines if line.strip())
    return text[:most].rsplit("\n", 1)[0] if len(text) > most else text


def shortened(text: str, most: int) -> str:
    """The first paragraphs of a text in one line, as far as `most` characters, to a whole word."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0]


def first_sentence(text: str) -> str:
    """The first sentence of a documentation."""
    return re.split(r"(?<=[.!?])\s", text)[0]


def code_pairs(found: Iterable[Definition]) -> list[dict[str, str]]:
    """The task that is evaluated: the code of a definition, without its docstring, and the docstring."""
    return [{"anchor": one.code, "positive": one.documentation} for one in found if one.code]


def search_pairs(found: Iterable[Definition]) -> list[dict[str, str]]:
    """The use of the index: what a definition does, and its name with the rest of its documentation."""
    pairs: list[dict[str, str]] = []
    for one in found:
        sentence = first_sentence(one.documentation)
        rest = one.documentation[len(sentence) :].strip()
        pairs.append({"anchor": sentence, "positive": f"{one.title} {rest}".strip()})
    return pairs


def training_pairs(found: Iterable[Definition]) -> list[dict[str, str]]:
    """Pairs of the modules that are not held out: both tasks, what is written in C, and first lines with the bodies of
    functions without documentation."""
    own = [one for one in found if not one.held_out]
    return [*code_pairs(own), *search_pairs(own), *introspected_pairs(), *_body_pairs()]


def thinned(found: Iterable[Definition]) -> list[dict[str, str]]:
    """Copies of the pairs of definitions that lack other lines and words each, so that a pair cannot be learnt by
    heart."""
    own = [one for one in found if not one.held_out]
    pairs = code_pairs(own) * (COPIES + 1) + search_pairs(own) * COPIES
    drawn = random.Random(0)
    return [{name: _thinned(text, drawn) for name, text in pair.items()} for pair in pairs]


def _thinned(text: str, drawn: random.Random) -> str:
    """The text without a third of its lines, if it has more than two, and without a fifth of the words of the rest."""
    lines = text.split("\n")
    if len(lines) > 2:
        lines = [line for line in lines if drawn.random() < 0.67] or lines[:1]
    kept = ["".join(part for part in re.findall(r"\w+|\W+", line) if drawn.random() < 0.8) for line in lines]
    thin = "\n".join(line for line in kept if line.strip())
    return thin if re.search(r"\w", thin) else text


def held_out_pairs(found: Iterable[Definition]) -> list[dict[str, str]]:
    """The pairs of the held-out modules whose evaluation is shown during training."""
    return code_pairs(one for one in found if one.held_out)


def introspected_pairs() -> Iterator[dict[str, str]]:
    for module in public_modules():
        if not is_held_out(module):
            for name, documentation in introspected(module):
                text = shortened(documentation, DOCUMENTATION)
                sentence = first_sentence(text)
                if len(sentence) >= 15:
                    yield {"anchor": sentence, "positive": f"{name} {text[len(sentence) :].strip()}".strip()}


def _body_pairs() -> Iterator[dict[str, str]]:
    for document in corpus.collect():
        module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        parts = [part.removeprefix("test_") for part in module.split(".")]
        if is_held_out(module) or (document.is_test and any(map(is_held_out, parts))):
            continue
        lines = document.text.split("\n")
        for node in ast.walk(ast.parse(document.text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node):
                continue
            body = _stripped(lines[node.body[0].lineno - 1 : node.end_lineno], CODE)
            number = int.from_bytes(hashlib.sha256(f"{module}{node.name}".encode()).digest()[:4], "big")
            wanted = number % NAMED["tests" if document.is_test else "library"] == 0
            if wanted and len(body) >= 60 and not node.name.startswith("__"):
                yield {"anchor": f"def {node.name}({ast.unparse(node.args)})", "positive": body}


def words(text: str) -> list[str]:
    """The words of a text, identifiers whole, in lower case."""
    return re.findall(r"\w+", text.lower())


def split_words(text: str) -> list[str]:
    """The words of a text, identifiers split at underscores, digits and changes of case, in lower case."""
    return re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A text of the index."""

    name: str
    text: str


def entries(found: Iterable[Definition]) -> list[Entry]:
    """Public names with their documentation: modules, what the sources define, and what is written in C."""
    texts: dict[str, str] = {}
    for one in found:
        module = PUBLIC_NAMES.get(one.module, one.module)
        name = f"{module}.{one.name}"
        if not NOT_INDEXED.match(module) and not _private(name):
            signature = one.signature if len(one.signature) <= 60 else "(...)"
            texts.setdefault(name, f"{name}{signature}: {shortened(one.documentation, ENTRY)}")
    for module in public_modules():
        for name, documentation in introspected(module):
            texts.setdefault(name, f"{name}: {shortened(documentation, ENTRY)}")
    return [Entry(name=name, text=texts[name]) for name in sorted(texts)]


def public_modules() -> list[str]:
    """The names of the top-level modules of the library that can be imported without an effect."""
    names = sorted(sys.stdlib_module_names)
    return [name for name in names if not name.startswith("_") and name not in NOT_IMPORTED]


def introspected(module: str) -> Iterator[tuple[str, str]]:
    """The documentation of a module, and of its functions and types that are written in C."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            loaded = importlib.import_module(module)
    except ImportError:
        return
    if loaded.__doc__:
        yield module, loaded.__doc__
    prefix = "" if module == "builtins" else f"{module}."
    for name, value in sorted(vars(loaded).items()):
        owner = getattr(value, "__module__", None) or module
        if name.startswith("_") or owner.lstrip("_") not in (
            module,
            f"{module}module",
            "builtins",
            "posix",
            "io",
        ):
            continue
        if inspect.isbuiltin(value) and value.__doc__:
            yield f"{prefix}{name}", value.__doc__
        elif inspect.isclass(value) and not value.__flags__ & 512:  # Py_TPFLAGS_HEAPTYPE: a class of Python
            if owner == "builtins" and module != "builtins":
                continue
            if value.__doc__:
                yield f"{prefix}{name}", value.__doc__
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.ismethoddescriptor(function) and function.__doc__:
                    yield f"{prefix}{name}.{method}", function.__doc__


def _private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def digest(found: Iterable[Definition]) -> str:
    """SHA-256 of all definitions: two runs with the same digest trained on the same corpus."""
    state = hashlib.sha256()
    for one in found:
        state.update(f"{one.title}\0{one.documentation}\0{one.code}\0".encode())
    return state.hexdigest()
