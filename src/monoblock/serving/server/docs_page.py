"""/docs: the endpoints as one HTML page without scripts, styles or other files from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from typing import Any

from monoblock.serving.server.fields import ApiField, Endpoint, Status

STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;"
    "padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;"
    "padding:.3rem .6rem;border-bottom:1px solid #8884}code{font-family:ui-monospace,monospace}"
)
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OTHERS = (
    ("GET /v1/models", "The models, with what they are used for and whether they are loaded."),
    ("GET /v1/models/{name}", "One model."),
    ("GET /health", "200 if the server is ready; 503 while it loads its model or stops."),
    ("GET /metrics", "Prometheus' metrics."),
    ("GET /openapi.json", "This page for programs."),
)


def kind_name(schema: dict[str, Any]) -> str:
    """A JSON schema in words: "integer from 1 to 128"."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "const" in schema:
        return f'"{schema["const"]}"' if isinstance(schema["const"], str) else str(schema["const"]).lower()
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(kind_name(part) for part in schema[union]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {kind_name(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and (high is None or high >= 2**31 - 1):
        return f"{kind}, at least {low:g}"
    return f"{kind} from {low:g} to {high:g}" if low is not None else kind


def field_kind(endpoint: Endpoint, field: ApiField) -> str:
    """The type of a field in words."""
    if field.status is Status.REFUSED:
        return "-"
    schema = endpoint.model.model_json_schema()["properties"][field.name]
    return kind_name(schema)


def _marked(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def docs_html(endpoints: Iterable[Endpoint]) -> str:
    """The page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>monoblock: API</title><style>{STYLE}</style><h1>API</h1>",
        "<p>OpenAI's API. A field is honoured, accepted without effect, or refused by name.</p><ul>",
        *(f"<li><code>{html.escape(name)}</code>: {html.escape(about)}" for name, about in OTHERS),
        "</ul>",
    ]
    for endpoint in endpoints:
        parts += [
            f"<h2>POST {html.escape(endpoint.path)}</h2><p>{_marked(endpoint.about)}</p><table>",
            "<tr><th>field<th>type<th>status<th>effect, or reason",
        ]
        for field in endpoint.fields:
            required = ", required" if field.required else ""
            kind = html.escape(field_kind(endpoint, field))
            parts.append(
                f"<tr><td><code>{field.name}</code><td>{kind}{required}<td>{field.status}<td>{_marked(field.about)}"
            )
        parts.append("</table>")
    return "\n".join(parts)
