"""Chat templates: Jinja from a model's files, which is somebody else's program, run where it can do no harm.

The sandbox refuses attributes that lead to Python's internals, gives the template plain copies of the data, and takes
each of its operations through `budget`, which bounds the time and the size of all values. For that the syntax tree is
changed before it is compiled: what loops run over, what is written out, and lists and texts that are put together pass
through filters of ours.
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
    """The text of a conversation, and where in it (first character, end) the `{% generation %}` blocks are."""

    text: str
    generated: list[tuple[int, int]]


_run: ContextVar[Run] = ContextVar("monoblock_template_run")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts, and refuses at once instead of when a forbidden value is used."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in budget.METHODS.get(cast(Any, type(obj)), ()):
            return True
        kind = next((kind for kind in budget.METHODS if isinstance(obj, kind)), None)
        if kind is not None and type(obj) is not kind and attr not in dir(kind):
            kind = None  # a subclass's own: marked-up text, a group of `groupby`
        ours = kind is not None or isinstance(obj, bytes | complex)
        allowed = not ours or (kind is not None and attr in budget.METHODS[kind])
        return allowed and super().is_safe_attribute(obj, attr, value)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        run.step()
        context, called, *rest = args
        function = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format in its own
        if isinstance(owner := getattr(function, "__self__", None), str):
            budget.check_method(run, owner, getattr(function, "__name__", ""), rest, kwargs)
        return run.made(super().call(context, called, *rest, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        del context
        compute: Any = self.binop_table[operator]
        return budget.binary(_run.get(), operator, left, right, compute)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _Metering().visit(super()._parse(source, name, filename)))


def _through(name: str, node: Any, line: int) -> Any:
    """A filter of ours around an expression; around None, around the text of a block."""
    return nodes.Filter(node, name, [], [], None, None).set_lineno(line)


class _Metering(NodeTransformer):
    """Takes the parts of a template that make values, or make them again and again, through filters of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("metered", node.iter, node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        parts: list[Any] = [
            nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part for part in node.nodes
        ]
        node.nodes = [_through("written", part, node.lineno) for part in parts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("concatenated", nodes.Tuple(node.nodes, "load"), node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("made", node, node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through("made", node, node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("made", node, node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("made", node, node.lineno) if node.ctx == "load" else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _through("made", node.filter, node.lineno)
        return node


# The filters of `_Metering`. They take the context so that Jinja does not compute them while it compiles.


@pass_context
def _metered(_: Any, values: Iterable[Any]) -> Iterator[Any]:
    return _run.get().metered(values)


@pass_context
def _made(_: Any, value: Any) -> Any:
    run = _run.get()
    run.step()
    return run.made(value)


@pass_context
def _written(_: Any, value: Any) -> str:
    run = _run.get()
    run.step()
    return run.made(run.text(value))


@pass_context
def _concatenated(_: Any, parts: tuple[Any, ...]) -> str:
    run = _run.get()
    run.step()
    texts = [run.text(part) for part in parts]
    check_size(sum(map(len, texts)))
    return run.made("".join(texts))


def _guarded(function: Callable[..., Any], rule: budget.Rule | None) -> Callable[..., Any]:
    """A filter or a test, with its rule asked before and its result counted after."""
    # Jinja marks functions whose first argument is its own.
    ahead = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        run.step()
        if rule is None:
            for value in args[ahead:]:
                budget.check_number(value)
                run.weigh(value)
            return function(*args, **kwargs)
        given = list(args[ahead:])
        rule(run, given, kwargs)
        return run.made(function(*args[:ahead], *given, **kwargs))

    return call


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model itself wrote."""

    tags = {"generation"}  # noqa: RUF012 - the extension's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        marks = _run.get().marks
        return caller() if marks is None else f"{marks[0]}{caller()}{marks[1]}"


class _Namespace(Namespace):
    """`namespace(...)`, which may hold itself: it is never written out."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """`dict(...)` in a template: it makes dictionaries and gives no way to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _now(form: str) -> str:
    if len(form) > 200 or re.search(r"\d{3}", form):
        raise SecurityError("it formats the time to a width of hundreds")
    return datetime.now().strftime(form)


def _environment() -> _Sandbox:
    # Not optimised: that computes expressions of constants while it compiles, beside all bounds.
    sandbox: Any = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
    )
    filters = {**sandbox.filters, "tojson": budget.to_json, "from_json": budget.from_json}
    sandbox.filters = {name: _guarded(filters[name], rule) for name, rule in budget.RULES.items()}
    sandbox.filters.update(metered=_metered, made=_made, written=_written, concatenated=_concatenated)
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
        warnings.simplefilter("ignore", SyntaxWarning)  # Python's, of an index into a number and the like
        return _sandbox().from_string(source)


def render(source: str, variables: Mapping[str, Any], *, track: bool = False) -> Rendered:
    """Run a template; with `track` also say where its generation blocks are.

    Raises:
        ChatTemplateError: the template has an error, reaches for what it may not, does not end, or refuses the
            conversation through `raise_exception`, whose message is then the error's.
    """
    text = _execute(source, variables, None)
    if not track:
        return Rendered(text, [])
    # Digits between private characters: no filter changes them, and no message holds them by chance.
    number = secrets.randbelow(10**18)
    marks = (f"\ue000{number}\ue001", f"\ue001{number}\ue000")
    plain, spans = _spans(_execute(source, variables, marks), marks)
    if plain != text:
        raise ChatTemplateError(
            "the chat template changes its {% generation %} blocks after they are written (a filter around them), so "
            "there is no telling which tokens are the assistant's"
        )
    return Rendered(text, spans)


def _execute(source: str, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
    try:
        return _written_by(_compile(source), variables, marks)
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
        raise ChatTemplateError("the chat template was stopped: it calls itself without end") from error
    except Exception as error:  # a template is a program: anything can go wrong in it
        raise ChatTemplateError(
            f"the chat template failed on this conversation: {type(error).__name__}: {str(error)[:1000]}"
        ) from error


def _written_by(template: Template, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
    token = _run.set(Run(marks))
    try:
        pieces: list[str] = []
        length = 0
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            check_size(length)
        return "".join(pieces)
    finally:
        _run.reset(token)


def _spans(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and where the marked pieces are in it."""
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    for piece in re.split(f"({re.escape(marks[0])}|{re.escape(marks[1])})", text):
        if piece == marks[0]:
            starts.append(length)
        elif piece == marks[1]:
            spans.append((starts.pop(), length))
        else:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), sorted(spans)
