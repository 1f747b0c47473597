"""Chat templates: Jinja from a model's files, which is somebody else's program, run where it can do no harm.

The sandbox refuses attributes that lead to Python's internals, gives the template plain copies of the data, and
bounds its loop turns, its calls, its numbers and the text it makes. (Not everything: `replace` may still square
the length of a text.)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NamedTuple, NoReturn, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 5_000_000  # loop turns and calls; a conversation of 10,000 messages takes some 200,000
MAX_TEXT = 64 * 2**20  # characters, of the result and of any string or list on the way
MAX_POWER = 4096  # bits of a number


class ChatTemplateError(TemplateError, ValueError):
    """A chat template is missing, broken, refused, or refuses the conversation; the message says which."""


class Rendered(NamedTuple):
    """The text of a conversation, and where in it (first character, end) the `{% generation %}` blocks are."""

    text: str
    generated: list[tuple[int, int]]


@dataclass
class _Run:
    """One rendering: how much it has done, and the marks around its generation blocks."""

    marks: tuple[str, str] | None = None
    steps: int = field(default=0)

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ChatTemplateError(
                f"the chat template was stopped after {MAX_STEPS:,} loop turns and calls; it may never end"
            )


_run: ContextVar[_Run] = ContextVar("monoblock_template_run")


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise ChatTemplateError(
            f"the chat template was stopped: it makes a text of over {MAX_TEXT:,} characters"
        )


def _size(value: Any, times: Any = 1) -> int:
    """How long a string or a list would be, `times` repeated."""
    repeated = times if isinstance(times, int) else 1
    return len(cast(str, value)) * repeated if isinstance(value, str | list | tuple) else 0


def _sized(value: Any) -> Any:
    _check_size(_size(value))
    return value


def _check_widths(form: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse to fill a text up to a width that no prompt has: the numbers of a call, and those in a format."""
    _check_size(max((value for value in (*args, *kwargs.values()) if isinstance(value, int)), default=0))
    if isinstance(form, str) and re.search(r"\d{7}", form):
        raise SecurityError("it formats to a width of millions")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that fills its text up, with its widths checked."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_widths(args[0] if name == "format" else "", args, kwargs)
        return function(*args, **kwargs)

    return call


def _metered(values: Iterable[Any]) -> Iterator[Any]:
    run = _run.get()
    for value in values:
        run.step()
        yield value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts, and refuses at once instead of when a forbidden value is used."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _run.get().step()
        function = getattr(args[1], "__wrapped__", args[1])  # the sandbox wraps str.format in its own
        if isinstance(owner := getattr(function, "__self__", None), str):
            _check_widths(owner if function.__name__.startswith("format") else "", args[2:], kwargs)
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "*":
            _check_size(max(_size(left, right), _size(right, left)))
        elif operator == "%":
            _check_widths(left, (), {})
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_POWER:
                raise SecurityError("it computes with numbers of thousands of digits")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "metered", [], [], None, None)
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [nodes.Filter(part, "sized", [], [], None, None) for part in joined.nodes]
        return tree


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


class _Dict:
    """`dict(...)` in a template: it makes dictionaries and gives no way to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise(message: str) -> NoReturn:
    raise ChatTemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes for HTML, and its escapes would be read by the model."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _from_json(text: str) -> Any:
    """What a JSON text says; other texts as they are. A template asks `'from_json' is filter`, as others lack it."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> _Sandbox:
    sandbox: Any = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters.update(tojson=_to_json, from_json=_from_json, metered=_metered, sized=_sized)
    for name in ("center", "format", "indent"):
        sandbox.filters[name] = _bounded(name, sandbox.filters[name])
    sandbox.globals.pop("lipsum")
    sandbox.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict())
    return sandbox


@lru_cache(maxsize=1)
def _sandbox() -> _Sandbox:
    return _environment()


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
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
    token = _run.set(_Run(marks))
    try:
        pieces: list[str] = []
        length = 0
        for piece in _compile(source).generate(variables):
            pieces.append(piece)
            length += len(piece)
            _check_size(length)
        return "".join(pieces)
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
            f"the chat template failed on this conversation: {type(error).__name__}: {error}"
        ) from error
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
