"""Python functions as tools: the JSON schema of a function, from its type hints and its docstring."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_SCALARS = (int, float, str, bool, type(None))
_SECTIONS = ("Args:", "Returns:", "Raises:")


def get_json_schema(func: Callable[..., Any]) -> dict[str, Any]:
    """The tool description of a function, as chat templates expect it.

    The function needs type hints, and a Google-style docstring that describes each argument. A description that
    ends in `(choices: ["a", "b"])` becomes an `enum`.

    Returns:
        `{"type": "function", "function": {"name", "description", "parameters", "return"?}}`

    Raises:
        ValueError: a hint, a docstring or the description of an argument is missing or has no JSON equivalent.
    """
    name = getattr(func, "__name__", "operation")
    doc = inspect.getdoc(func)
    if not doc:
        raise ValueError(f"the tool {name} has no docstring; write one that describes it and each argument")
    sections = _sections(doc)
    described = _arguments(sections.get("Args:", ""))
    parameters, returned = _parameters(func, name)
    for argument, schema in parameters["properties"].items():
        if argument not in described:
            raise ValueError(
                f"the docstring of the tool {name} does not describe its argument {argument!r}; add it to Args:"
            )
        text = described[argument]
        if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", text, flags=re.IGNORECASE):
            schema["enum"] = _choices(choices.group(1), name, argument)
            text = text[: choices.start()].strip()
        schema["description"] = text
    function = {"name": name, "description": sections[""], "parameters": parameters}
    if returned is not None:
        if "Returns:" in sections:
            returned["description"] = sections["Returns:"]
        function["return"] = returned
    return {"type": "function", "function": function}


def _choices(text: str, name: str, argument: str) -> list[Any]:
    try:
        return [choice.strip() if isinstance(choice, str) else choice for choice in json.loads(text)]
    except ValueError as error:
        raise ValueError(
            f"the choices of {argument!r} of the tool {name} are not a JSON list: {text!r}"
        ) from error


def _parameters(func: Callable[..., Any], name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The schema of the arguments, and that of the result (None without a hint that has a schema)."""
    hints = get_type_hints(func)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for index, (argument, parameter) in enumerate(inspect.signature(func).parameters.items()):
        if argument not in hints:
            if index == 0 and argument in ("self", "cls"):
                continue
            raise ValueError(f"the argument {argument!r} of the tool {name} has no type hint; add one")
        properties[argument] = schema_of(hints[argument], f"{argument!r} of the tool {name}")
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    try:
        return parameters, schema_of(hints["return"], "") if "return" in hints else None
    except ValueError:  # the model never writes the result, so its schema is optional
        return parameters, None


def schema_of(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint; ValueError, which names `where`, for one without a JSON equivalent."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint], where)
    if origin is None and hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if origin is Literal:
        return _enum(list(args), where)
    if origin is Union or origin is types.UnionType:
        return _union(args, where)
    if origin is list:
        return {"type": "array", "items": schema_of(args[0], where)}
    if origin is tuple and len(args) > 1 and Ellipsis not in args:
        return {"type": "array", "prefixItems": [schema_of(arg, where) for arg in args]}
    if origin is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": schema_of(args[1], where)}
    raise ValueError(
        f"the type hint {hint!r} of {where} has no JSON schema: use str, int, float, bool, list[...], dict[str, ...], "
        "Literal, Enum or unions of those, or pass the schema itself as the tool"
    )


def _enum(values: Sequence[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(
            f"the choices {list(values)!r} of {where} must be strings, numbers, booleans or None, at least one"
        )
    kinds = list(dict.fromkeys(JSON_TYPES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _union(args: Sequence[Any], where: str) -> dict[str, Any]:
    schemas = [schema_of(arg, where) for arg in args if arg is not type(None)]
    kinds = sorted({schema["type"] for schema in schemas if isinstance(schema.get("type"), str)})
    if len(schemas) == 1:
        union = schemas[0]
    elif all(set(schema) == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        union = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        union = {"anyOf": schemas}
    return {**union, "nullable": True} if type(None) in args else union


def _sections(doc: str) -> dict[str, str]:
    """The sections of a Google-style docstring by heading; "" is the text before the first."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in doc.strip().splitlines():
        if line.strip() in _SECTIONS:
            current = line.strip()
            found[current] = []
        else:
            found[current].append(line)
    return {
        heading: "\n".join(lines).strip("\n") if heading == "Args:" else "\n".join(lines).strip()
        for heading, lines in found.items()
    }


def _arguments(block: str) -> dict[str, str]:
    """`name: description` lines, each joined with the indented lines that continue it."""
    described: dict[str, list[str]] = {}
    margin: int | None = None
    name = ""
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        margin = indent if margin is None else margin
        match = re.match(r"\s*(\w+):\s*(.*)", line)
        if match and indent <= margin:
            name, margin = match.group(1), indent
            described[name] = [match.group(2)]
        elif name:
            described[name].append(line)
    return {key: " ".join(line.strip() for line in lines if line.strip()) for key, lines in described.items()}


def tool_schema(tool: Any) -> dict[str, Any]:
    """The schema of a tool: a schema is returned unchanged, a function converted."""
    if isinstance(tool, dict):
        return cast(dict[str, Any], tool)
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return get_json_schema(tool)
    raise ValueError(
        f"a tool is a JSON schema (a dict) or a function with type hints and a docstring; got {type(tool).__name__}"
    )
