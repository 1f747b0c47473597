"""Check the built documentation site: links, anchors, external resources, and the API reference of every public name.

python tools/check_site.py [FOLDER]
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import monoblock

# Kinds of <link> that a browser does not load.
NOT_LOADED = ("canonical", "prev", "next", "alternate")


class Page(HTMLParser):
    """The ids, links and resources of one HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if name := given.get("id"):
            self.ids.add(name)
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        elif tag in ("link", "script", "img", "iframe") and given.get("rel") not in NOT_LOADED:
            self.resources += [source for name in ("href", "src") if (source := given.get(name))]


def faults(folder: Path) -> list[str]:
    """What is wrong with the site, one line each."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        return [f"{folder}: no pages"]
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        name = path.relative_to(folder)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name}: {link}: no such page")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name}: {link}: no such anchor")
        for source in page.resources:
            if urlsplit(source).scheme not in ("", "data") or source.startswith("//"):
                found.append(f"{name}: {source}: an external resource")
            elif not urlsplit(source).scheme and not (path.parent / urlsplit(source).path).exists():
                found.append(f"{name}: {source}: no such file")
    described = {name for path, page in pages.items() if path.parent.name == "api" for name in page.ids}
    missing = [name for name in sorted(monoblock._NAMES) if f"monoblock.{name}" not in described]
    return found + [f"api: {name} is not described" for name in missing]


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    if lines := faults(site):
        raise SystemExit("\n".join(lines))
    print(f"{site.name}: links, anchors and {len(monoblock._NAMES)} public names are complete")
