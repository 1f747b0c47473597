"""Bar charts as SVG for light and dark pages, without a plotting library."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from figures import LOSSLESS, OURS, Results, Spread, number, spread

WIDTH, NAMES, VALUES = 760, 210, 150  # of the picture, the column of names, the column of values
BAR, GAP, TITLE, HEAD = 16, 6, 30, 72
# Backend -> colour, visible on light and dark pages.
COLOURS = {
    OURS: "#2f7fd6",
    LOSSLESS: "#1f9fb8",
    "monoblock, plain": "#7fb2e8",
    "transformers": "#d98a1f",
    "llama.cpp": "#3f9f5f",
    "OpenVINO": "#9a6fd0",
    "CTranslate2": "#c95f78",
}
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:13px;fill:#333}.quiet{fill:#666}.strong{font-weight:600}"
    ".line{stroke:#999}.range{stroke:#333;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.quiet{fill:#aaa}.line{stroke:#888}.range{stroke:#eee}}"
)


@dataclass
class Bars:
    """A group of bars: a title, a value for each backend, and the machine's limit."""

    title: str
    bars: dict[str, Spread] = field(default_factory=dict[str, Spread])
    limit: float | None = None


NOTE = "thin line: the range of all rounds; each group has its own scale"


def chart(title: str, note: str, groups: list[Bars], unit: str) -> str:
    """The picture; the scale of each group ends at its limit or its longest bar."""
    height = HEAD + sum(TITLE + len(g.bars) * (BAR + GAP) + GAP for g in groups)
    elements = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<text x='0' y='18' class='strong' style='font-size:16px'>{escape(title)}</text>",
        f"<text x='0' y='38' class='quiet'>{escape(note)}</text>",
        f"<text x='0' y='56' class='quiet'>{NOTE}</text>",
    ]
    top = HEAD
    for group in groups:
        elements += _group(group, top, unit)
        top += TITLE + len(group.bars) * (BAR + GAP) + GAP
    return "\n".join([*elements, "</svg>\n"])


def _group(group: Bars, top: int, unit: str) -> list[str]:
    room = WIDTH - NAMES - VALUES
    longest = max([bar.most for bar in group.bars.values()] + [group.limit or 0.0])
    elements = [f"<text x='0' y='{top + 20}' class='strong'>{escape(group.title)}</text>"]
    for index, (who, bar) in enumerate(group.bars.items()):
        y = top + TITLE + index * (BAR + GAP)
        ends = [NAMES + room * value / longest for value in (bar.least, bar.median, bar.most)]
        strong = " class='strong'" if who == OURS else ""
        elements += [
            f"<text x='{NAMES - 10}' y='{y + 13}' text-anchor='end'{strong}>{escape(who)}</text>",
            f"<rect x='{NAMES}' y='{y}' width='{max(ends[1] - NAMES, 1):.1f}' height='{BAR}' rx='2'"
            f" fill='{COLOURS.get(who, '#888')}'/>",
            f"<path d='M{ends[0]:.1f} {y + BAR / 2}H{ends[2]:.1f}' class='range'/>",
            f"<text x='{WIDTH - VALUES + 12}' y='{y + 13}'{strong}>{number(bar.median)} {unit}</text>",
        ]
    if group.limit:
        x = NAMES + room * group.limit / longest
        y = top + TITLE - 4
        bottom = y + len(group.bars) * (BAR + GAP) + 2
        elements += [
            f"<path d='M{x:.1f} {y}V{bottom}' class='line' stroke-dasharray='4 3'/>",
            f"<text x='{x:.1f}' y='{y - 4}' text-anchor='end' class='quiet'>limit {number(group.limit)}</text>",
        ]
    return elements


def _groups(results: Results, measures: list[str], limits: bool = False) -> list[Bars]:
    groups = []
    for name in measures:
        for figure in results.named(name):
            model, form = figure["model"], figure["form"]
            if model.startswith("thin") or len(figure["values"]) < 2:
                continue
            size = results.read_bytes(model, form, OURS) if limits else None
            bars = {who: spread(values) for who, values in figure["values"].items()}
            title = f"{model}, {form}" + ("" if limits or len(measures) == 1 else f", {name}")
            limit = results.reads([figure]).median * 1e9 / size if size else None
            groups.append(Bars(title, bars, limit))
    return groups


TITLES = {
    "decode": "Decoding, batch size 1",
    "batch": "Decoding, batch size 8",
    "prefill": "Prefill",
    "memory": "Memory while loading",
}


def pictures(results: Results) -> dict[str, str]:
    """The pictures of docs/performance.md for which the run has figures, by name."""
    limit = "dashed: what the measured bandwidth allows for the bytes that monoblock reads"
    prompts = _groups(results, results.measures("prefill"))
    wanted = {
        "decode": (limit, _groups(results, ["decode 1"], True), "tok/s"),
        "batch": ("tokens of all sequences", _groups(results, ["decode 8"]), "tok/s"),
        "prefill": ("tokens of one prompt, until the first new token", prompts, "tok/s"),
        "memory": ("peak beyond the libraries; shorter is better", _groups(results, ["load peak"]), "MB"),
    }
    return {
        name: chart(TITLES[name], note, groups, unit)
        for name, (note, groups, unit) in wanted.items()
        if groups
    }
