"""JSON files with errors that name the file and the position; atomic writes."""

from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.json_text import parsed
from monoblock.checkpoint.transaction import staged, write_atomically
from monoblock.errors import CheckpointError

__all__ = ["read_json", "staged", "write_atomically"]


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` names the file and the position of a syntax error."""
    path = Path(path)
    try:
        content: object = parsed(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; expected an object {{...}}")
    return cast(dict[str, Any], content)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
