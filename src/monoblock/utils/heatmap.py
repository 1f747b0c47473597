"""Heatmaps of queries and keys: as lines for a terminal, as a drawing, and as an HTML page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from monoblock.utils.drawing import Drawing, TextElement
from monoblock.utils.labels import clipped, clusters, width
from monoblock.utils.visibility import Bools, Floats, Ints

LEVELS = 16  # number of shades in a drawing
MASKED = "#f1f1f1"
# The lightest and the darkest colour of a cell, for text keys and for image patches.
_RAMPS = (((205, 223, 241), (8, 48, 107)), ((253, 216, 178), (150, 50, 3)))
# Terminals: block characters by intensity, and their colours (of 256), visible on any background.
_BLOCKS, _ASCII = "░▒▓█", "-+x#"
_COLOURS = ((24, 25, 26, 32, 38, 44, 50, 87), (94, 130, 136, 166, 172, 208, 214, 220))
_LABEL, _HEADER = 16, 10  # maximum of columns and lines of labels on a terminal
_CELL, _LETTER = 16, 11  # pixels


@dataclass(frozen=True)
class Panel:
    """One heatmap: `shade` (q, k) in 0..1, NaN where the key is masked.

    `labels`: of the tokens; `image`: True for keys that are image patches; `padding`: True for padding tokens;
    `legend`: the meaning of the shades.
    """

    title: str
    legend: str
    labels: tuple[str, ...]
    shade: Floats
    image: Bools
    padding: Bools


@dataclass(frozen=True)
class Style:
    """The capabilities of a terminal: columns, colour, and characters beyond ASCII."""

    columns: int = 80
    colour: bool = False
    ascii: bool = False


def levels(shade: Floats, count: int) -> Ints:
    """Each shade as an integer in 0..count - 1, -1 where the key is masked."""
    found = np.minimum(np.floor(np.nan_to_num(shade, nan=0.0) * count), count - 1).astype(np.int64)
    return np.where(np.isnan(shade), -1, found)


# ---------------------------------------------------------------------------- terminal


def lines(panel: Panel, style: Style) -> Iterator[str]:
    """The panel as lines of text, two columns per key; the first and the last tokens if they do not all fit."""
    labels = [_plain(label) if style.ascii else label for label in panel.labels]
    digits = len(str(len(labels) - 1))
    widest = min(_LABEL, max(map(width, labels)), max(4, style.columns // 4))
    shown = _shown(len(labels), (style.columns - widest - digits - 2) // 2)
    indent = " " * (widest + digits + 2)
    yield _painted(panel.title, "1", style)
    yield from (indent + line for line in _header(labels, shown, style))
    kept = [index for index in shown if index is not None]
    cells = dict(zip(kept, _cells(panel, kept, style), strict=True))
    for query in shown:
        if query is None:
            yield " " * (widest - 1) + _mark("⋮", style)
            continue
        label = clipped(labels[query], widest)
        label = label.replace("…", "~") if style.ascii else label
        name = label + " " * (widest - width(label))
        name = _painted(name, "2", style) if panel.padding[query] else name
        left = iter(cells[query])
        row = [("… ", "2") if key is None else next(left) for key in shown]
        yield f"{name} {query:>{digits}} " + _joined(row, style)
    yield from _legend_lines(panel, shown, style)


def _shown(count: int, room: int) -> list[int | None]:
    """The indices of the tokens that fit; None where others are left out."""
    if count <= room:
        return list(range(count))
    half = max(room - 1, 2)
    first = half - half // 2
    return [*range(first), None, *range(count - half // 2, count)]


def _header(labels: Sequence[str], shown: Sequence[int | None], style: Style) -> Iterator[str]:
    """The keys' labels, each written downwards in its two columns."""
    columns = [[] if k is None else _downwards(labels[k], style) for k in shown]
    height = max(map(len, columns))
    for line in range(height):
        characters = [column[i] if (i := line - height + len(column)) >= 0 else "" for column in columns]
        yield "".join(character + " " * (2 - width(character)) for character in characters).rstrip()


def _downwards(label: str, style: Style) -> list[str]:
    characters = clusters(label)
    return (
        characters
        if len(characters) <= _HEADER
        else [*characters[: _HEADER - 1], "~" if style.ascii else "⋮"]
    )


def _cells(panel: Panel, kept: Sequence[int], style: Style) -> list[list[tuple[str, str]]]:
    """The characters, two columns wide, and the colour of each cell between the kept tokens."""
    masked = ("· ", "2")
    blocks = _ASCII if style.ascii else _BLOCKS
    ramps = [[(block + " ", "0") for block in blocks] + [masked]] * 2
    if style.colour:
        solid = blocks[-1] * 2
        ramps = [[(solid, f"38;5;{code}") for code in codes] + [masked] for codes in _COLOURS]
    rows = levels(panel.shade[np.ix_(kept, kept)], len(ramps[0]) - 1).tolist()
    by_key = [ramps[int(panel.image[key])] for key in kept]
    return [[ramp[level] for ramp, level in zip(by_key, row, strict=True)] for row in rows]


def _joined(row: Sequence[tuple[str, str]], style: Style) -> str:
    """Cells in a line; adjacent cells of one colour share its escape code."""
    runs = itertools.groupby(row, key=lambda cell: cell[1])
    return "".join(_mark("".join(text for text, _ in run), style, code) for code, run in runs).rstrip()


def _legend_lines(panel: Panel, shown: Sequence[int | None], style: Style) -> Iterator[str]:
    strong = "##" if style.ascii else "██"
    weak = strong if style.colour else (_ASCII if style.ascii else _BLOCKS)[0]
    ends = {"weak": (weak, _COLOURS[0][0]), "strong": (strong[: 1 + style.colour], _COLOURS[0][-1])}
    keys = {word: _painted(block, f"38;5;{code}", style) for word, (block, code) in ends.items()}
    plain = panel.legend.format(weak=keys["weak"], strong=keys["strong"])
    note = f"{plain}   {_mark('·', style)} masked   rows: queries, columns: keys"
    if panel.image.any() and style.colour:
        note += "   " + _painted(strong, f"38;5;{_COLOURS[1][-1]}", style) + " image patch"
    yield note
    if None in shown:
        first = list(shown).index(None)
        yield _painted(
            f"Only the first {first} and the last {len(shown) - first - 1} of {len(panel.labels)} tokens fit here; "
            "an SVG, PNG or HTML file shows all.",
            "2",
            style,
        )


def _mark(text: str, style: Style, code: str = "2") -> str:
    text = text.translate({ord("·"): ".", ord("…"): "~", ord("⋮"): ":"}) if style.ascii else text
    return _painted(text, code, style)


def _plain(label: str) -> str:
    spelled = label.translate({ord("␣"): "_", ord("↵"): "\\n", ord("⇥"): "\\t"})
    return spelled.encode("ascii", "backslashreplace").decode()


def _painted(text: str, code: str, style: Style) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if style.colour else text


# ---------------------------------------------------------------------------- files


def drawing(panels: Sequence[Panel], title: str) -> Drawing:
    """All panels in one drawing, side by side if they are small; no token is left out."""
    count = len(panels[0].labels)
    cell = max(1, min(_CELL, 1600 // count))
    letter = min(_LETTER, max(cell, 8))
    margin = (
        math.ceil(max(width(clipped(label, 24)) for p in panels for label in p.labels) * letter * 0.62) + 10
    )
    side = margin + count * cell
    across = max(1, min(len(panels), 1500 // (side + 24)))
    wide = (
        max(side, *(math.ceil(len(_words(p)) * 6.6) for p in panels), *(len(p.title) * 8 for p in panels))
        + 24
    )
    tall = side + 64
    canvas = Drawing(across * wide + 16, math.ceil(len(panels) / across) * tall + 40, title)
    canvas.texts.append(TextElement(16, 20, title, 15, "#111111"))
    for number, panel in enumerate(panels):
        row, column = divmod(number, across)
        _draw(canvas, panel, (16 + column * wide, 40 + row * tall), (margin, cell, letter))
    return canvas


def _words(panel: Panel) -> str:
    words = panel.legend.format(weak="light", strong="dark") + "; grey: masked"
    return words + ("; orange: image patch" if panel.image.any() else "")


def _draw(canvas: Drawing, panel: Panel, corner: tuple[int, int], sizes: tuple[int, int, int]) -> None:
    margin, cell, letter = sizes
    count = len(panel.labels)
    left, top = corner[0] + margin, corner[1] + 22 + margin
    canvas.texts.append(TextElement(corner[0], corner[1] + 10, panel.title, 13, "#111111"))
    canvas.texts.append(TextElement(corner[0], top + count * cell + 16, _words(panel), 11, "#666666"))
    canvas.box(MASKED, left, top, count * cell, count * cell)
    gap = 1 if cell >= 6 else 0
    rows = levels(panel.shade, LEVELS)
    codes = np.where(rows < 0, -1, rows + LEVELS * panel.image[None, :])
    for query, row in enumerate(codes):
        starts = np.flatnonzero(np.diff(row, prepend=-2))
        runs = zip(starts.tolist(), np.diff(starts, append=count).tolist(), row[starts].tolist(), strict=True)
        for start, length, code in runs:
            if code >= 0:
                x, y = left + start * cell, top + query * cell
                canvas.box(shade_colour(code), x, y, length * cell - gap, cell - gap)
    if gap:
        for key in range(1, count):
            canvas.gaps.append((left + key * cell - 1, top, 1, count * cell))
            canvas.gaps.append((left, top + key * cell - 1, count * cell, 1))
    step = math.ceil((letter + 1) / cell)
    for index in range(0, count, step):
        middle = (index + 0.5) * cell
        colour = "#b0b0b0" if panel.padding[index] else "#333333"
        label = clipped(panel.labels[index], 24)
        canvas.texts.append(TextElement(left - 5, top + middle, label, letter, colour, "end"))
        canvas.texts.append(TextElement(left + middle, top - 5, label, letter, colour, upright=True))


def shade_colour(code: int) -> str:
    """The colour of a level; the levels of image patches follow those of text."""
    ramp, level = divmod(code, LEVELS)
    share = level / (LEVELS - 1)
    light, dark = _RAMPS[ramp]
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(light, dark, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def page(panels: Sequence[Panel], title: str) -> str:
    """A self-contained HTML page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>\n"
        "<style>body{margin:1.5rem;background:#fff}svg{max-width:none}</style></head>\n"
        f"<body>\n{drawing(panels, title).svg()}</body></html>\n"
    )
