"""Limits of a chat template: processor time, and the size of every value that it creates.

No value is larger than `MAX_TEXT` characters when formatted; an operation that would create one is refused before it
runs. So each operation takes a fraction of a second, and a time check before each of them stops the rest. Lists may
contain one another many times; `weigh` counts their formatted size, not their memory.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

MAX_SECONDS = 2.0  # of processor time, for one conversation; one of 10,000 messages takes 0.3
MAX_TEXT = 16 * 2**20  # characters, of the result and of any intermediate value
MAX_MADE = 16 * MAX_TEXT  # characters of all values together, so that they fit into memory if all stay alive
MAX_BITS = 4096  # of an integer
MAX_SOURCE = 2**16  # characters of a template; the longest known have 20,000
ITEM = 8  # size of an item of a list or a number, in addition to its characters
_COPIED = 2  # size of each item of a list in the total: a pointer of 8 bytes, of which most copies are freed
_KEPT = 256  # the weight of lists from this size on is cached

Container = str | list[Any] | tuple[Any, ...] | dict[Any, Any]


class ChatTemplateError(TemplateError, ValueError):
    """A chat template is missing, invalid or refused, or it rejects the conversation; the message says which."""


@dataclass
class Run:
    """The state of one rendering: resources used so far, and the markers of its generation blocks."""

    marks: tuple[str, str] | None = None
    total: int = 0
    _start: float = field(default_factory=time.monotonic)
    _used: float = field(default_factory=time.thread_time)
    _weights: dict[int, tuple[Any, int]] = field(default_factory=dict[int, tuple[Any, int]])

    def step(self) -> None:
        """Called for each loop iteration and operation; ChatTemplateError when the time is up."""
        # The cheap clock first; elapsed time alone may be that of other processes.
        if time.monotonic() - self._start > MAX_SECONDS and time.thread_time() - self._used > MAX_SECONDS:
            raise ChatTemplateError(
                f"the chat template was stopped after {MAX_SECONDS:g} s; it may never end"
            )

    def count(self, value: Any) -> Any:
        """Count a value that an operation created; ChatTemplateError if it, or the total, is too large."""
        if isinstance(value, str):
            check_size(len(value))
            self._count(len(value))
        elif isinstance(value, list | tuple | dict):
            self.weigh(cast("Container", value))
            self._count(_COPIED * len(cast("Container", value)))
        return cast("Any", value)

    def _count(self, size: int) -> None:
        self.total += size
        if self.total > MAX_MADE:
            raise ChatTemplateError(
                f"the chat template was stopped: it creates strings of over {MAX_MADE:,} characters in total"
            )

    def weigh(self, value: Any) -> int:
        """The formatted size of a value in characters; ChatTemplateError if it is too large."""
        if type(value) is str:
            return len(value) + ITEM
        if not isinstance(value, list | tuple | dict):
            if isinstance(value, KeysView | ValuesView | ItemsView):
                return self.weigh(tuple(cast("Iterable[Any]", value)))
            return ITEM + (len(value) if isinstance(value, str) else 0)
        container = cast("list[Any]", value)
        if (known := self._weights.get(id(container))) is not None:
            return known[1]
        weight = ITEM * (len(container) + 1)
        iterables: tuple[Iterable[Any], ...] = (container,)
        if isinstance(value, dict):
            iterables = (container, cast("dict[Any, Any]", value).values())
        for values in iterables:
            for item in values:
                weight += len(item) + ITEM if type(item) is str else self.weigh(item)
                if weight > MAX_TEXT:
                    check_size(weight)
        if weight >= _KEPT:
            self._weights[id(container)] = (container, weight)  # the reference keeps its id from being reused
        return weight

    def count_list(self, value: Any, weight: int) -> Any:
        """A list of values that were weighed before, with the sum of their weights."""
        check_size(weight)
        self._weights[id(value)] = (value, weight)
        return self.count(value)

    def text(self, value: Any) -> str:
        """A value formatted as a string."""
        if not isinstance(value, str):
            self.weigh(value)
            value = str(value)
        check_size(len(value))
        return value

    def metered(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, with a `step` for each."""
        for value in values:
            self.step()
            if isinstance(value, list | tuple | dict):
                self.weigh(cast("Container", value))
            yield value

    def listed(self, values: Any) -> list[Any]:
        """The values as a list of limited length."""
        found: list[Any] = []
        for value in self.metered(values):
            found.append(value)
            check_size(ITEM * len(found))
        return found


def check_size(size: float) -> None:
    """ChatTemplateError for a string or list that exceeds MAX_TEXT."""
    if size > MAX_TEXT:
        raise ChatTemplateError(
            f"the chat template was stopped: it creates a string of over {MAX_TEXT:,} characters"
        )


def check_number(value: Any) -> None:
    """SecurityError for an integer that is slow to compute with."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise SecurityError("it computes with numbers of thousands of digits")


def _limited(value: Any, most: int, what: str) -> None:
    if isinstance(value, int | float) and not abs(value) <= most:
        raise ChatTemplateError(f"the chat template was stopped: it asks for {what} of over {most:,}")


# ------------------------------------------------------------------ operators


def binary(run: Run, operator: str, left: Any, right: Any, compute: Callable[[Any, Any], Any]) -> Any:
    """The result of a binary operator, if it is not too large."""
    run.step()
    check_number(left)
    check_number(right)
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        )
        if operator in ("*", "**") and bits > MAX_BITS:
            raise SecurityError("it computes with numbers of thousands of digits")
        return compute(left, right)
    lists = isinstance(left, list | tuple) or isinstance(right, list | tuple)
    if operator == "+" and lists:
        return run.count_list(compute(left, right), run.weigh(left) + run.weigh(right))
    if operator == "*":
        times = left if isinstance(left, int) else right if isinstance(right, int) else 1
        text = left if isinstance(left, str) else right if isinstance(right, str) else None
        once = max(run.weigh(left), run.weigh(right)) if text is None else len(text)
        weight = once * max(times, 0)
        check_size(weight)
        return run.count_list(compute(left, right), weight) if lists else run.count(compute(left, right))
    if operator == "%" and isinstance(left, str):
        check_percent(run, left, right)
    elif operator == "+":
        check_size(run.weigh(left) + run.weigh(right))
    return run.count(compute(left, right))


_STARRED = re.compile(r"%[^a-zA-Z%]*\*")
_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")
_DIGITS = re.compile(r"\d+")


def _widths(form: str) -> int:
    """An upper bound of the sum of widths and precisions in a format string."""
    found = _DIGITS.findall(form)
    if any(len(digits) > 6 for digits in found):
        raise SecurityError("it formats to a width of over a million characters")
    return sum(map(int, found))


def check_percent(run: Run, form: str, values: Any) -> None:
    """Refuse `form % values` with a result that is too long."""
    if _STARRED.search(form):
        raise SecurityError("it formats to a computed width")
    check_size(len(form) + _widths(form) + form.count("%") * 4 * run.weigh(values))


def check_format(run: Run, form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse `form.format(...)` with a result that is too long."""
    if _NESTED.search(form):
        raise SecurityError("it formats to a computed width")
    check_size(len(form) + _widths(form) + form.count("{") * 4 * run.weigh([*args, *kwargs.values()]))


# ------------------------------------------------------------------ methods

# Methods that a template may call on the values that it gets; all others are refused. Methods of str that lead to bytes
# or translation tables are left out: no template needs them.
METHODS: dict[type[Any], frozenset[str]] = {
    str: frozenset(name for name in dir(str) if name[0] != "_")
    - {"encode", "format_map", "maketrans", "translate"},
    list: frozenset({"count", "index", "copy"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    int: frozenset({"bit_length", "bit_count", "real", "imag", "numerator", "denominator", "conjugate"}),
    float: frozenset({"is_integer", "real", "imag", "conjugate"}),
}


def check_method(run: Run, owner: str, name: str, args: list[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a str method whose result would be too long; a generator among `args` becomes a list."""
    if name in ("center", "ljust", "rjust", "zfill"):
        _limited(args[0] if args else kwargs.get("width"), MAX_TEXT, "a width")
    elif name == "expandtabs":
        size = args[0] if args else kwargs.get("tabsize", 8)
        check_size(len(owner) + owner.count("\t") * (size if isinstance(size, int) else 8))
    elif name == "replace" and len(args) >= 2:
        check_replaced(owner, args[0], args[1])
    elif name == "join" and args:
        if not isinstance(args[0], str | list | tuple | dict):
            args[0] = run.listed(args[0])
        check_size(run.weigh(args[0]) + len(owner) * len(cast("Container", args[0])))
    elif name == "format":
        check_format(run, owner, args, kwargs)
    elif name == "striptags":  # of Markup; quadratic in the length
        check_slow(run, owner, 2**15)


def check_replaced(text: str, old: Any, new: Any) -> None:
    """Refuse a replacement whose result would be too long."""
    if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        check_size(len(text) + text.count(old) * (len(new) - len(old)))


def check_slow(run: Run, value: Any, most: int) -> None:
    """ChatTemplateError for a value that is too large for a slow operation."""
    if run.weigh(value) > most:
        raise ChatTemplateError(
            f"the chat template was stopped: it spends too long on a string of over {most:,} characters"
        )


# ------------------------------------------------------------------ filters

# (run, the filter's arguments, its keywords) -> None; may replace the arguments in place
Rule = Callable[[Run, list[Any], dict[str, Any]], None]


def _argument(args: list[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _slow(most: int) -> Rule:
    return lambda run, args, kwargs: check_slow(run, [*args, *kwargs.values()], most)


def _number(position: int, name: str, most: int, what: str) -> Rule:
    return lambda _, args, kwargs: _limited(_argument(args, kwargs, position, name), most, what)


def _iterated(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    del kwargs
    if args and not isinstance(args[0], dict):
        args[0] = run.metered(args[0])


def _collected(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    del kwargs
    if args and not isinstance(args[0], str | dict | list | tuple):
        args[0] = run.listed(args[0])


def _grouped(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Sorting by an attribute takes microseconds per item, without an iteration in which `step` could stop it."""
    _collected(run, args, kwargs)
    if args:
        _limited(len(args[0]), 2**18, "groups of a sequence")


def _sorted(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    """As `_grouped`: all items are there before the first is compared."""
    _collected(run, args, kwargs)
    if args:
        _limited(len(args[0]), 2**18, "a list to sort,")


def _joined(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    _collected(run, args, kwargs)
    separator = run.text(_argument(args, kwargs, 1, "d") or "")
    check_size(run.weigh(args[0]) + len(separator) * len(args[0]))


def _replaced(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    old, new = _argument(args, kwargs, 1, "old"), _argument(args, kwargs, 2, "new")
    check_replaced(run.text(args[0]), run.text(old), run.text(new))


def _indented(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    text, width = run.text(args[0]), _argument(args, kwargs, 1, "width")
    _limited(width, MAX_TEXT, "a width")
    size = len(width) if isinstance(width, str) else max(int(width), 0) if isinstance(width, int) else 4
    check_size(len(text) + size * (len(text.splitlines()) + 1))


def _formatted(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    check_percent(run, run.text(args[0]), [*args[1:], *kwargs.values()])


def _wrapped(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    check_slow(run, args[0], 2**17)
    separator = run.text(_argument(args, kwargs, 3, "wrapstring") or "\n")
    check_size(len(separator) * (len(run.text(args[0])) + 1))


def _as_json(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    weight = run.weigh(args[0])
    indent, separators = _argument(args, kwargs, 2, "indent"), _argument(args, kwargs, 3, "separators")
    if separators is not None:
        check_size(run.weigh(separators) * (weight // ITEM))
    if indent is not None:
        check_slow(run, args[0], 2**21)
        width = len(indent) if isinstance(indent, str) else indent
        _limited(width, 1000, "an indentation")
        check_size(weight + weight // ITEM * max(int(width), 0) * _depth(args[0]))


def _depth(value: Any) -> int:
    """The nesting depth of a value."""
    if isinstance(value, dict):
        return 1 + max(map(_depth, cast("dict[Any, Any]", value).values()), default=0)
    return 1 + max(map(_depth, cast("list[Any]", value)), default=0) if isinstance(value, list | tuple) else 0


def _from_json(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    del run, kwargs
    if isinstance(args[0], str) and args[0].count("[") + args[0].count("{") > MAX_TEXT // 64:
        raise ChatTemplateError("the chat template was stopped: it reads JSON of too many objects")


def _int(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    del run, kwargs
    if isinstance(args[0], str) and len(args[0]) > 4000:  # longer than any integer that Python parses
        args[0] = ""


def _filled(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    _collected(run, args, kwargs)
    _limited(_argument(args, kwargs, 1, "linecount"), 100_000, "a length")
    _limited(_argument(args, kwargs, 1, "slices"), 100_000, "a number of slices")


def _unlimited(run: Run, args: list[Any], kwargs: dict[str, Any]) -> None:
    """No limit: time and result are proportional to the arguments."""
    del run, args, kwargs


# The available filters. Filters that later versions of Jinja add are not available to templates.
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape"), _unlimited
    ),
    **dict.fromkeys(
        ("first", "float", "forceescape", "length", "last", "lower", "items", "reverse"), _unlimited
    ),
    **dict.fromkeys(("safe", "string", "trim", "truncate", "upper", "random", "filesizeformat"), _unlimited),
    **dict.fromkeys(("list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr"), _iterated),
    **dict.fromkeys(("sum", "unique"), _iterated),
    "sort": _sorted,
    "groupby": _grouped,
    "batch": _filled,
    "slice": _filled,
    "center": _number(1, "width", MAX_TEXT, "a width"),
    "format": _formatted,
    "from_json": _from_json,
    "indent": _indented,
    "int": _int,
    "join": _joined,
    "pprint": _slow(2**16),
    "replace": _replaced,
    "round": _number(1, "precision", 100, "a precision"),
    "striptags": _slow(2**15),
    "title": _slow(2**20),
    "tojson": _as_json,
    "urlencode": _slow(2**20),
    "urlize": _slow(2**15),
    "wordcount": _slow(2**21),
    "wordwrap": _wrapped,
    "xmlattr": _slow(2**20),
}


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes: Jinja's own filter adds them, and the model would see them."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def from_json(text: str) -> Any:
    """The value of a JSON string; other strings unchanged. Templates test for it with `'from_json' is filter`."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def refuse(message: Any) -> NoReturn:
    """`raise_exception` of templates: rejects the conversation."""
    raise ChatTemplateError(str(message)[:10_000])
