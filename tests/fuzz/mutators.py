"""Mutations of JSON values, texts and bytes, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

NESTED: Any = "x"
for _ in range(30):
    NESTED = [NESTED]

# Boundary values and values of unexpected types.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.0, 0.5, 2.0, 32.0, -0.5, 1e-30, 1e30, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        2**16,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        -(2**31),
        -(2**63),
        10**7,
        10**9,
        10**30,
    ),
    *(
        "",
        " ",
        "3",
        "-1",
        "1e5",
        "true",
        "None",
        "nan",
        "\0",
        "🎉",
        "é",
        "x" * 2000,
        "▁",
        "<s>",
        "default",
        "yarn",
    ),
    *(
        "../../etc/passwd",
        "/dev/zero",
        "{{ 1/0 }}",
        "<|endoftext|>",
        "a\nb",
        "torch.float16",
        "float32",
        "mistral",
    ),
    *([], {}, [[]], [None], [0], [1, 2], ["a"], ["a", 1], [[1, 2]], [1] * 500, [[], [[]]], NESTED),
    *({"": 1}, {"a": 1}, {"a": {}}, {"0": 0}, {"type": "yarn"}, {"rope_type": "llama3"}, {"content": "a"}),
    *(
        {"__type": "AddedToken"},
        {"__type": "AddedToken", "content": 3},
        {"__type": "AddedToken", "content": "a"},
    ),
)
# Names of methods and attributes, which fields must not override.
KEYS = (
    *(
        "to_spec",
        "to_dict",
        "fields",
        "__class__",
        "__init__",
        "_types",
        "_labels",
        "num_labels",
        "validate",
        "check",
    ),
    *(
        "FIELDS",
        "_loaded",
        "preprocess",
        "patched",
        "_options",
        "decode",
        "_tokenizer",
        "get",
        "items",
        "keys",
        "copy",
    ),
    *(
        "model_type",
        "name_or_path",
        "use_return_dict",
        "torch_dtype",
        "hidden_size",
        "self",
        "kwargs",
        "",
        "a.b",
        "🎉",
    ),
)
NUMBERS = tuple(v for v in VALUES if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**64)
Path = tuple[Any, ...]


def paths(value: Any, path: Path = ()) -> list[Path]:
    """The paths of all nested values, as tuples of keys and indices."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 40)):
            found += paths(value[index], (*path, index))
    return found


def at(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def with_changed(value: Any, path: Path, new: Any) -> Any:
    """The value with `new` at that path."""
    if not path:
        return new
    parent = at(value, path[:-1])
    parent[path[-1]] = new
    return value


def _like(rng: random.Random, old: Any) -> Any:
    """A value similar to the old one, mostly of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        changes: list[Callable[[], Any]] = [
            lambda: old + 1,
            lambda: old - 1,
            lambda: -old,
            lambda: old * 2,
            lambda: old * 1000,
            lambda: old // 2,
            lambda: float(old),
            lambda: old / 3,
            lambda: str(old),
            lambda: rng.randrange(200),
            lambda: [old],
        ]
        return rng.choice(changes)()
    if isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        return rng.choice(
            [
                old[:at],
                old.upper(),
                old + "x",
                old[:at] + rng.choice("\0▁<é🎉{%}") + old[at:],
                [old],
                old * 50,
            ]
        )
    if isinstance(old, list):
        at = rng.randrange(len(old) + 1)
        return rng.choice(
            [old[:at], old[::-1], old * 3, [*old, rng.choice(VALUES)], {"0": old}, [*old, *old[:1]]]
        )
    if isinstance(old, dict):
        return rng.choice([list(old.items()), list(old), {**old, rng.choice(list(old) or ["a"]): None}])
    return rng.choice(VALUES)


def json_mutant(rng: random.Random, value: Any, more: Any = None) -> Any:
    """A copy of a JSON value with one to three mutations; values may be copied from `more`."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        path = rng.choice(paths(value))
        old = at(value, path)
        match rng.randrange(8):
            case 0 | 1 | 2:
                value = with_changed(value, path, copy.deepcopy(rng.choice(VALUES)))
            case 3 | 4:
                value = with_changed(value, path, _like(rng, old))
            case 5 if path:
                parent = at(value, path[:-1])
                del parent[path[-1]]
            case 6 if isinstance(old, dict):
                source = more if isinstance(more, dict) and rng.random() < 0.5 else value
                key = rng.choice(list(source) if isinstance(source, dict) and source else ["a"])
                old[rng.choice((key, key, key, f"{key}x", rng.choice(KEYS)))] = copy.deepcopy(
                    rng.choice(VALUES)
                )
            case _:
                other = more if more is not None and rng.random() < 0.3 else value
                nested = copy.deepcopy(at(other, rng.choice(paths(other))))
                value = with_changed(value, path, nested)
    return value


def json_text(rng: random.Random, value: Any, more: Any = None) -> bytes:
    """A mutated JSON file; 6% have mutated bytes instead of mutated values."""
    if rng.random() < 0.06:
        return bytes_mutant(rng, json.dumps(value).encode())
    return json.dumps(json_mutant(rng, value, more)).encode()


def _number(rng: random.Random) -> bytes:
    """An integer in binary, of random width and byte order."""
    number = rng.choice((*NUMBERS, 0xFF, 0x7F, 0x80, 0xFFFF, rng.randrange(2**16)))
    width = rng.choice((1, 2, 4, 8))
    return (number % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))


def _varint(rng: random.Random) -> bytes:
    number = rng.choice((*NUMBERS, 2**64 - 1, 2**64 - 3, rng.randrange(300)))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def bytes_mutant(rng: random.Random, raw: bytes, near: int = 0) -> bytes:
    """Bytes with one to four mutations, most of them within the first `near` bytes (0: anywhere)."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if not data:
            data += rng.randbytes(rng.randrange(1, 20))
            continue
        span = min(near, len(data)) if near and rng.random() < 0.8 else len(data)
        at = rng.randrange(span)
        match rng.randrange(10):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                new = _number(rng)
                data[at : at + len(new)] = new
            case 3:
                new = _varint(rng)
                data[at : at + rng.randrange(len(new) + 1)] = new
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 5:
                del data[at : at + rng.choice((1, 1, 2, 4, 8, 64, 500))]
            case 6:
                del data[at:]
            case 7:
                chunk = bytes(data[at : at + rng.randrange(1, 64)])
                to = rng.randrange(len(data))
                data[to:to] = chunk * rng.choice((1, 1, 2, 30))
            case 8:
                chunk = bytes(data[at : at + rng.randrange(1, 32)])
                to = rng.randrange(len(data))
                data[to : to + len(chunk)] = chunk
            case _:
                data[at : at + 4] = struct.pack("<f", rng.choice((0.0, float("nan"), float("inf"), -1e30)))
    return bytes(data)


def text_mutant(rng: random.Random, text: str) -> bytes:
    """A text with mutated lines, characters or bytes."""
    if rng.random() < 0.3:
        return bytes_mutant(rng, text.encode())
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        line = lines[at]
        match rng.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, rng.choice(lines or [""]))
            case 2:
                lines[at] = rng.choice(
                    ("", " ", "\0", "a", "a b c", "🎉", "x" * 3000, "\u2028", "\t", "#version")
                )
            case 3:
                cut = rng.randrange(len(line) + 1)
                lines[at] = line[:cut] + rng.choice((" ", "\0", "é", "▁", "  ", "\r", "")) + line[cut:]
            case 4:
                lines[at] = line[: rng.randrange(len(line) + 1)]
            case _:
                lines = lines * rng.choice((2, 3))
        lines = lines or [""]
    return "\n".join(lines).encode()
