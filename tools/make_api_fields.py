"""Writes docs/api-fields.md from the tables of the server's endpoints: `python tools/make_api_fields.py`."""

from __future__ import annotations

from pathlib import Path

from monoblock.serving.server.app import DOCUMENTED
from monoblock.serving.server.docs_page import field_kind
from monoblock.serving.server.fields import ApiField, Endpoint, Status

DOCUMENT = Path(__file__).parents[1] / "docs" / "api-fields.md"
HEAD = """# Fields of the API

Each field of a request to `monoblock serve` is *honoured*, *accepted* without effect because its absence
harms nobody, or *refused* by name: status 400 with OpenAI's error object, whose `param` is the field. A
field that is not in the table is refused too. `null` is the same as the field's absence. A refused field is
accepted with a value that asks for nothing, which its row names.

`tools/make_api_fields.py` writes this page from the tables in `src/monoblock/serving/server/endpoints.py` and
`attention_view.py`; tests send each field to a server.
"""


def _value(value: object) -> str:
    import json

    return f"`{json.dumps(value)}`"


def row(endpoint: Endpoint, field: ApiField) -> str:
    """A row of the table."""
    about = field.about
    if field.idle:
        about += f"; accepted: {', '.join(map(_value, field.idle))}"
    status = "**required**" if field.required else str(field.status)
    kind = field_kind(endpoint, field) if field.status is not Status.REFUSED else "-"
    return f"| `{field.name}` | {kind} | {status} | {about} |".replace("||", "|")


def document() -> str:
    """The text of the page."""
    parts = [HEAD]
    for endpoint in DOCUMENTED:
        parts += [
            f"\n## {endpoint.path}\n\n{endpoint.about}\n",
            "\n| field | type | status | effect, or reason |\n|---|---|---|---|\n",
            *(f"{row(endpoint, field)}\n" for field in endpoint.fields),
        ]
    return "".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
