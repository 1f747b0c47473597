"""Tables and pictures of a run.

    python bench/report.py bench-results.json               tables to standard output
    python bench/report.py bench-results.json --docs docs   into docs/performance.md and docs/performance/*.svg

Text between the marks `<!-- NAME -->` and `<!-- end of NAME -->` of the page is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import machine
import plot
import targets
from figures import OURS, Results, Spread, number, spread

# The pictures above the table of a section.
PICTURES = {"decode": ("decode", "batch"), "prefill": ("prefill",), "loading": ("memory",)}


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(titles), *map(list, rows)]
    head = "| " + " | ".join(lines[0]) + " |\n" + "|---" * len(lines[0]) + "|\n"
    return head + "".join("| " + " | ".join(line) + " |\n" for line in lines[1:])


def speeds(results: Results, names: list[str], share: Callable[..., Spread | None], title: str) -> str:
    """A table of measures: each backend's speed, monoblock's relative to it, and its fraction of a limit."""
    rows: list[list[str]] = []
    for name in names:
        for figure in results.named(name):
            for who in figure["values"]:
                found = share(figure, who)
                rows.append([*_cells(results, name, figure, who), found.percent if found else ""])
    size = {"decode": "batch size", "prefill": "tokens", "train": "tokens x 4"}[names[0].split()[0]]
    return table(
        ["model", "weights", size, "backend", "tok/s (range)", "monoblock / backend (range)", title], rows
    )


def _cells(results: Results, name: str, figure: dict[str, Any], who: str) -> list[str]:
    """A backend's figure, and monoblock's relative to it."""
    ratio = results.ratio(figure, who)
    cells = [figure["model"], figure["form"], name.split()[-1], who]
    return [*cells, str(spread(figure["values"][who])), "" if ratio is None else str(ratio)]


def loading(results: Results) -> str:
    """Time and memory of loading."""
    rows: list[list[str]] = []
    for figure in results.named("load"):
        model, form = figure["model"], figure["form"]
        for who, seconds in figure["values"].items():
            others = [results.values(model, form, m, who) for m in ("import", "first token", "load peak")]
            size = results.data["weights"].get(f"{model} {form}", {}).get(who)
            cells = [str(spread(v)) if v else "" for v in (others[0], seconds, *others[1:])]
            rows.append([model, form, who, *cells, number(size / 1e6) if size else ""])
    titles = ["import s", "load s", "first token s", "peak of loading, MB", "weights read per token, MB"]
    return table(["model", "weights", "backend", *titles], rows)


def processes(results: Results) -> str:
    """Complete processes that load no model."""
    found = results.data["processes"].items()
    return table(["process", "seconds (range)"], [[f"`{name}`", str(spread(s))] for name, s in found])


def memory(results: Results) -> str:
    """Memory of a prompt in addition to the loaded model."""
    rows = []
    for name in results.measures("prefill"):
        for figure in results.named(f"{name} memory"):
            for who in figure["values"]:
                if who != "llama.cpp":  # its figure includes the weights
                    rows.append(_cells(results, name, figure, who))
    return table(
        ["model", "weights", "tokens", "backend", "MB beyond the model", "backend / monoblock"], rows
    )


def overhead(results: Results) -> str:
    """Overhead besides arithmetic, from a model of small width at two depths."""
    rows = [
        [who, f"{1e3 * found[0]:.3f}", f"{1e3 * found[1]:.3f}"]
        for who in (OURS, "transformers")
        if (found := targets.overhead(results, who))
    ]
    return table(["backend", "ms per layer", "other ms per token"], rows)


def accuracy(results: Results) -> str:
    """Errors of logits and tokens against float32."""
    rows = []
    for row in results.data.get("accuracy", []):
        error = ["", ""] if row["error"] is None else [f"{row['error']:.1e}", f"{row['worst']:.1e}"]
        plain = ""
        if "as plain" in row:
            gaps = row["margins at divergence"]
            plain = f"{row['as plain']} of {row['tokens in all']}" + (
                f"; differs at ties within {max(gaps):.1e}" if gaps else ""
            )
        equal = f"{row['tokens equal']} of {row['tokens in all']}"
        cells = [row["model"], row["form"], row["who"], str(row["batch"])]
        rows.append([*cells, *error, equal, f"{row['largest gap']:.1e}", plain])
    titles = [
        "logits' error, rms",
        "at most",
        "tokens equal to the reference's",
        "furthest from a tie",
        "equal to plain PyTorch",
    ]
    return table(["model", "weights", "backend", "batch size", *titles], rows)


def sections(results: Results) -> dict[str, str]:
    """Sections of the page, by the name of their marks."""
    data = results.data
    skipped = "".join(f"- {why}\n" for why in data["skipped"])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    about = f"{machine.line(data['machine'], data['limits'])}"
    if decoding := results.named("decode 1"):
        about += f"; during decoding: read GB/s {results.reads(decoding)}"
    about += f". {versions}. Measured on {data['date']}"
    about += f" in {data['minutes']} minutes.\n" if "minutes" in data else ".\n"
    found = {"machine": textwrap.fill(about, 110, break_on_hyphens=False) + "\n"}
    if data["plan"] != "quick":  # targets are for the full sizes
        found["targets"] = targets.table_of(results, table)
    for kind, share, title in (
        ("decode", results.bandwidth_share, "share of the bandwidth"),
        ("prefill", results.matrix_share, "share of the matrix rate"),
        ("train", lambda *_: None, ""),
    ):
        if names := results.measures(kind):
            found[kind] = speeds(results, names, share, title)
    found |= {
        "loading": loading(results),
        "processes": processes(results),
        "memory": memory(results),
        "accuracy": accuracy(results),
    }
    if results.named("decode 1") and targets.overhead(results, OURS):
        found["overhead"] = overhead(results)
    return found | {"skipped": skipped or "- nothing\n"}


def illustrated(parts: dict[str, str], drawn: dict[str, str]) -> dict[str, str]:
    """The sections with links to their pictures."""
    links = {
        name: "".join(
            f"![{plot.TITLES[one]}](performance/{one}.svg)\n\n"
            for one in PICTURES.get(name, ())
            if one in drawn
        )
        for name in parts
    }
    return {name: links[name] + text for name, text in parts.items()}


def tables(data: dict[str, Any]) -> str:
    """All sections as one text."""
    return "\n".join(f"## {name}\n\n{text}" for name, text in sections(Results(data)).items())


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with the text between its marks replaced; marks without a section are unchanged."""
    for name, text in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page = mark.sub(lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}", page)
    return page


def main() -> None:
    """Prints the tables, or writes the page and its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, help="folder of performance.md")
    parser.add_argument("--part", action="append", default=[], help="only this section; may be repeated")
    args = parser.parse_args()
    data = json.loads(args.results.read_text())
    if args.docs is None:
        print(tables(data))
        return
    page, pictures = args.docs / "performance.md", args.docs / "performance"
    drawn = plot.pictures(Results(data))
    parts = illustrated(sections(Results(data)), drawn)
    if unknown := set(args.part) - set(parts):
        raise SystemExit(f"--part {', '.join(sorted(unknown))}: {args.results} has {', '.join(parts)}")
    if args.part:
        parts = {name: parts[name] for name in args.part}
        drawn = {one: drawn[one] for name in parts for one in PICTURES.get(name, ()) if one in drawn}
    page.write_text(fill(page.read_text(), parts))
    pictures.mkdir(exist_ok=True)
    for name, picture in drawn.items():
        (pictures / f"{name}.svg").write_text(picture)
        print(pictures / f"{name}.svg")


if __name__ == "__main__":
    main()
