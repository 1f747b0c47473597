"""Check values of fields against their declared types.

Types are annotations: `int`, `float`, `bool`, `str`, `None`, unions, `list[T]`, `tuple[A, B]`, `dict[K, V]`, `Literal`,
`TypedDict` (keys may be missing, and others present), classes, and `Any`.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import reprlib
import sys
import types
import typing
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, cast

from monoblock.errors import FieldError

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    list: "a list",
    tuple: "a list",
    dict: "a dict",
    type(None): "None",
}
MAX_INTEGER = 2**63 - 1  # the largest size of a tensor

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlong = 40


def brief(value: Any) -> str:
    """The value for an error message: one line, abbreviated."""
    return " ".join(_short.repr(value).splitlines())


class _Misfit(Exception):
    """A value of the wrong type; `path`: keys and indices that lead to the wrong element."""

    def __init__(self, expected: str, value: Any, path: str = ""):
        super().__init__(expected)
        self.expected, self.value, self.path = expected, value, path


def checked(owner: str, name: str, value: Any, kind: Any) -> Any:
    """The value of the field `name` of `owner`, if it has that type; floats with integer values become ints.

    FieldError names the field, the type and the value.
    """
    try:
        return _fitted(value, kind)
    except _Misfit as misfit:
        raise FieldError(
            f"{owner}.{name}{misfit.path} must be {misfit.expected}, got {brief(misfit.value)}", name
        ) from None


def checked_fields(owner: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """`checked` for the values with declared types; other values are returned unchanged."""
    return {
        name: checked(owner, name, value, kinds[name]) if name in kinds else value
        for name, value in values.items()
    }


@contextmanager
def in_file(path: Path | str, given: Mapping[str, Any] | None = None) -> Generator[None]:
    """Prefix FieldErrors with the file's name, except for fields that `given` overrides."""
    try:
        yield
    except FieldError as error:
        if given is not None and error.field in given:
            raise
        raise FieldError(f"{path}: {error}", error.field) from None


@functools.cache
def declared(cls: type) -> dict[str, Any]:
    """The types of a class's annotated attributes, including inherited ones; `Any` if a type cannot be resolved."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        names = vars(sys.modules.get(base.__module__, typing))
        for name, kind in inspect.get_annotations(base).items():
            text = getattr(kind, "__forward_arg__", kind)  # in a TypedDict a string is a ForwardRef
            found[name] = kind
            if isinstance(text, str):
                try:
                    found[name] = eval(text, dict(names), dict(vars(base)))
                except (NameError, TypeError, SyntaxError, AttributeError):
                    found[name] = Any
    return found


_SCALARS = frozenset([int, float, bool, str, type(None)])


@functools.cache
def _origin_and_args(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """The origin (`Union`, `list`, `tuple`, `dict`, `Literal` or None) and the arguments of a type."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return Union, typing.get_args(kind)
    if typing.is_typeddict(kind) or kind is dict or origin in (dict, Mapping):
        return dict, typing.get_args(kind)
    return kind if kind in (list, tuple) else origin, typing.get_args(kind)


def _fitted(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    if kind is None or kind in _SCALARS:
        return _plain(value, kind)
    origin, args = _origin_and_args(kind)
    if origin is Union:
        return value if value is None and type(None) in args else _of_union(value, args)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise _Misfit(_described(kind), value)
        return value
    if origin is dict:
        return _mapping(value, kind)
    if origin in (list, tuple):
        return _sequence(value, origin, args)
    if not isinstance(value, kind):
        raise _Misfit(_described(kind), value)
    return value


def _plain(value: Any, kind: Any) -> Any:
    """A number, a boolean, a string or None; NumPy numbers are converted to Python's."""
    if kind in (None, type(None)):
        if value is None:
            return None
    elif kind is bool or kind is str:
        if isinstance(value, kind):
            return value
    elif not isinstance(value, bool):
        if type(value) is kind is int and -MAX_INTEGER <= value <= MAX_INTEGER:
            return value
        number: Any = value
        if isinstance(value, numbers.Integral):
            number = int(value)
        elif isinstance(value, numbers.Real):
            number = float(value)
            if kind is int and number.is_integer():
                number = int(number)
        if isinstance(number, int):
            if -MAX_INTEGER <= number <= MAX_INTEGER:
                return number
            raise _Misfit(f"{_WORDS[kind]} of at most 63 bits", value)
        if kind is float and isinstance(number, float):
            if math.isfinite(number):
                return number
            raise _Misfit("a finite number", value)
    raise _Misfit(_described(kind), value)


def _of_union(value: Any, kinds: Sequence[Any]) -> Any:
    inner: _Misfit | None = None
    later = int if float in kinds else None  # in `int | float`, an integral float stays a float
    for kind in kinds if later is None else sorted(kinds, key=lambda kind: kind is later):
        try:
            return _fitted(value, kind)
        except _Misfit as misfit:
            if misfit.path:
                inner = misfit
    raise inner or _Misfit(" or ".join(_described(kind) for kind in kinds), value)


def _mapping(value: Any, kind: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _Misfit("a dict", value)
    given = cast("Mapping[Any, Any]", value)
    inner = declared(kind) if typing.is_typeddict(kind) else {}
    args = typing.get_args(kind)
    changed: dict[Any, Any] = {}
    for key, item in given.items():
        wanted = inner.get(key, Any) if isinstance(key, str) else Any
        if args:
            wanted = args[1]
            _under(f"[{brief(key)}]", key, args[0])
        fitted = _under(f".{key}" if inner else f"[{brief(key)}]", item, wanted)
        if fitted is not item:
            changed[key] = fitted
    return {**given, **changed} if changed else cast("Any", given)


def _sequence(value: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        raise _Misfit(_described(origin[args] if args else origin), value)
    items = list(cast("Sequence[Any]", value))
    if origin is tuple and args and Ellipsis not in args:
        if len(items) != len(args):
            raise _Misfit(_described(tuple[args]), cast("Any", value))
        kinds = args
    else:
        kinds = (args[0] if args else Any,) * len(items)
    fitted = [_under(f"[{i}]", item, kind) for i, (item, kind) in enumerate(zip(items, kinds, strict=True))]
    same = all(new is old for new, old in zip(fitted, items, strict=True))
    return cast("Any", value) if same else type(cast("Any", value))(fitted)


def _under(prefix: str, value: Any, kind: Any) -> Any:
    try:
        return _fitted(value, kind)
    except _Misfit as misfit:
        raise _Misfit(misfit.expected, misfit.value, prefix + misfit.path) from None


def _described(kind: Any) -> str:
    """A type as text."""
    if kind in _WORDS:
        return _WORDS[kind]
    if kind is None:
        return "None"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(arg) for arg in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is list and args and args[0] in (int, float, str):
        return f"a list of {_WORDS[args[0]].partition(' ')[2]}s"
    if typing.is_typeddict(kind) or origin in (dict, Mapping):
        return "a dict"
    if origin in (list, tuple):
        return f"a list of {len(args)} values" if origin is tuple and ... not in args else "a list"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
