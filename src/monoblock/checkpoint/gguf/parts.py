"""The names of the parts of a model that is split into several GGUF files."""

import re

from monoblock.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)")
_MOST_PARTS = 1000


def part_names(name: str) -> list[str] | None:
    """The file names of all parts of the model of which a file is the first; None for a name without a number.
    CheckpointError: it is another part."""
    if (match := _PART.fullmatch(name)) is None:
        return None
    count = int(match["count"])
    if int(match["number"]) != 1 or not 1 <= count <= _MOST_PARTS:
        first = f"{match['stem']}-00001-of-{match['count']}{match['end']}"
        raise CheckpointError(f"{name} is one of several parts of a model: give the first one, {first}")
    return [f"{match['stem']}-{i:05}-of-{match['count']}{match['end']}" for i in range(1, count + 1)]
