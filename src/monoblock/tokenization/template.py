"""Renders chat templates: untrusted Jinja programs from a model's files, run in a sandbox.

The sandbox refuses attributes that lead to Python's internals, passes plain copies of the data, and takes each
operation through `budget`, which limits the time and the size of all values. For that the syntax tree is changed before
compilation: the iterables of loops, the output, and constructed lists and strings pass through internal filters.
"""

from __future__ import annotations

import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NamedTuple, NoReturn, cast

from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from monoblock.tokenization import budget
from monoblock.tokenization.budget import MAX_SOURCE, ChatTemplateError, Run, check_size

__all__ = ["ChatTemplateError", "Rendered", "render"]


class Rendered(NamedTuple):
    """The text of a conversation, and the character spans (start, end) of its `{% generation %}` blocks."""

    text: str
    generated: list[tuple[int, int]]


_run: ContextVar[Run] = ContextVar("monoblock_template_run")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget; it refuses a forbidden value at its access, not at its use."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it accesses {attribute!r} of a {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in budget.METHODS.get(cast(Any, type(obj)), ()):
            return True
        kind = next((kind for kind in budget.METHODS if isinstance(obj, kind)), None)
        if kind is not None and type(obj) is not kind and attr not in dir(kind):
            kind = None  # an attribute of a subclass: Markup, a group of `groupby`
        ours = kind is not None or isinstance(obj, bytes | complex)
        allowed = not ours or (kind is not None and attr in budget.METHODS[kind])
        return allowed and super().is_safe_attribute(obj, attr, value)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        run.step()
        context, called, *rest = args
        function = getattr(
            called, "__wrapped__", called
        )  # the sandbox wraps str.format in a function of its own
        if isinstance(owner := getattr(function, "__self__", None), str):
            budget.check_method(run, owner, getattr(function, "__name__", ""), rest, kwargs)
        return run.count(super().call(context, called, *rest, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        del context
        compute: Any = self.binop_table[operator]
        return budget.binary(_run.get(), operator, left, right, compute)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _BudgetTransformer().visit(super()._parse(source, name, filename)))


def _filtered(name: str, node: Any, line: int) -> Any:
    """An internal filter applied to an expression; to None, applied to the text of a block."""
    return nodes.Filter(node, name, [], [], None, None).set_lineno(line)


class _BudgetTransformer(NodeTransformer):
    """Applies internal filters to the nodes that create values or iterate."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("metered", node.iter, node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        values: list[Any] = [
            nodes.Const(value.data) if isinstance(value, nodes.TemplateData) else value
            for value in node.nodes
        ]
        node.nodes = [_filtered("written", value, node.lineno) for value in values]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("concatenated", nodes.Tuple(node.nodes, "load"), node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("counted", node, node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("counted", node, node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("counted", node, node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("counted", node, node.lineno) if node.ctx == "load" else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered("counted", node.filter, node.lineno)
        return node


# The filters of `_BudgetTransformer`. They take the context so that Jinja does not evaluate them at compile time.


@pass_context
def _metered(_: Any, values: Iterable[Any]) -> Iterator[Any]:
    return _run.get().metered(values)


@pass_context
def _counted(_: Any, value: Any) -> Any:
    run = _run.get()
    run.step()
    return run.count(value)


@pass_context
def _written(_: Any, value: Any) -> str:
    run = _run.get()
    run.step()
    return run.count(run.text(value))


@pass_context
def _concatenated(_: Any, values: tuple[Any, ...]) -> str:
    run = _run.get()
    run.step()
    texts = [run.text(value) for value in values]
    check_size(sum(map(len, texts)))
    return run.count("".join(texts))


def _guarded(function: Callable[..., Any], rule: budget.Rule | None) -> Callable[..., Any]:
    """A filter or a test with its rule checked before and its result counted after the call."""
    # Jinja passes a context, an environment or the like as the first argument of such functions.
    implicit = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        run.step()
        if rule is None:
            for value in args[implicit:]:
                budget.check_number(value)
                run.weigh(value)
            return function(*args, **kwargs)
        given = list(args[implicit:])
        rule(run, given, kwargs)
        return run.count(function(*args[:implicit], *given, **kwargs))

    return call


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: the text that the model itself generates."""

    tags = {"generation"}  # noqa: RUF012 - the extension's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        marks = _run.get().marks
        return caller() if marks is None else f"{marks[0]}{caller()}{marks[1]}"


class _Namespace(Namespace):
    """`namespace(...)`, which may contain itself and is therefore never formatted."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """`dict(...)` in a template: makes dictionaries without access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _now(form: str) -> str:
    if len(form) > 200 or re.search(r"\d{3}", form):
        raise SecurityError("it formats the time to a width of over 100 characters")
    return datetime.now().strftime(form)


def _environment() -> _Sandbox:
    # Not optimised: the optimiser evaluates constant expressions at compile time, outside the budget.
    sandbox: Any = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
    )
    filters = {**sandbox.filters, "tojson": budget.to_json, "from_json": budget.from_json}
    sandbox.filters = {name: _guarded(filters[name], rule) for name, rule in budget.RULES.items()}
    sandbox.filters.update(metered=_metered, counted=_counted, written=_written, concatenated=_concatenated)
    sandbox.tests = {name: _guarded(function, None) for name, function in sandbox.tests.items()}
    sandbox.globals.pop("lipsum")
    sandbox.globals.update(
        raise_exception=budget.refuse, strftime_now=_now, dict=_Dict(), namespace=_Namespace
    )
    return sandbox


@lru_cache(maxsize=1)
def _sandbox() -> _Sandbox:
    return _environment()


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
    if len(source) > MAX_SOURCE:
        raise ChatTemplateError(
            f"the chat template has {len(source):,} characters; expected at most {MAX_SOURCE:,}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", SyntaxWarning
        )  # of the generated Python, such as an index into a number
        return _sandbox().from_string(source)


def render(source: str, variables: Mapping[str, Any], *, track: bool = False) -> Rendered:
    """Run a template; with `track` also find its generation blocks.

    Raises:
        ChatTemplateError: the template has an error, accesses a forbidden attribute, exceeds its budget, or rejects the
            conversation through `raise_exception`, whose message is then the error's.
    """
    text = _execute(source, variables, None)
    if not track:
        return Rendered(text, [])
    # Digits between private-use characters: no filter changes them, and no message contains them by chance.
    number = secrets.randbelow(10**18)
    marks = (f"\ue000{number}\ue001", f"\ue001{number}\ue000")
    plain, spans = _spans(_execute(source, variables, marks), marks)
    if plain != text:
        raise ChatTemplateError(
            "the chat template changes its {% generation %} blocks after they are written (a filter around them), so "
            "the assistant's tokens cannot be located"
        )
    return Rendered(text, spans)


def _execute(source: str, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
    try:
        return _generate(_compile(source), variables, marks)
    except ChatTemplateError:
        raise
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template has a syntax error on line {error.lineno}: {error.message}"
        ) from error
    except SecurityError as error:
        raise ChatTemplateError(
            f"the chat template is refused: {error}; templates may only format messages"
        ) from error
    except RecursionError as error:
        raise ChatTemplateError("the chat template was stopped: it recurses without end") from error
    except Exception as error:  # a template is a program and may raise anything
        raise ChatTemplateError(
            f"the chat template failed on this conversation: {type(error).__name__}: {str(error)[:1000]}"
        ) from error


def _generate(template: Template, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
    token = _run.set(Run(marks))
    try:
        chunks: list[str] = []
        length = 0
        for chunk in template.generate(variables):
            chunks.append(chunk)
            length += len(chunk)
            check_size(length)
        return "".join(chunks)
    finally:
        _run.reset(token)


def _spans(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the spans of the marked chunks in it."""
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    for chunk in re.split(f"({re.escape(marks[0])}|{re.escape(marks[1])})", text):
        if chunk == marks[0]:
            starts.append(length)
        elif chunk == marks[1]:
            spans.append((starts.pop(), length))
        else:
            plain.append(chunk)
            length += len(chunk)
    return "".join(plain), sorted(spans)
