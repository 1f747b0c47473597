"""The page at `/`: its files, and the headers that they are served with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The browser runs no script, style or frame of another origin, and none that is written into the HTML.
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"
# Only these are served, at /page/NAME; index.html at /.
NAMES = tuple(
    sorted(
        path.name for path in Path(__file__).parent.iterdir() if path.suffix in _TYPES and path.name != INDEX
    )
)


@dataclass(frozen=True)
class PageFile:
    """A file of the page with its media type."""

    content: bytes
    type: str


def page_file(name: str = INDEX) -> PageFile:
    """A file of the page; KeyError for a name that is not one of its files."""
    if name != INDEX and name not in NAMES:
        raise KeyError(name)
    path = Path(__file__).parent / name
    return PageFile(path.read_bytes(), _TYPES[path.suffix])
