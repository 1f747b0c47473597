"""The loss curve as an SVG file, without a plotting library."""

from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 64, 20, 20, 52
COLOURS = {"training": "#9bb8d3", "held out": "#c4472d"}
STYLE = "font-family='system-ui, sans-serif' font-size='13' fill='#444'"


def draw(lines: dict[str, Points], x_label: str, y_label: str) -> str:
    """The named lines (keys of COLOURS) in one chart; the y axis starts at an integer below the data."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = ticks(0.0, max(xs)), ticks(float(int(min(ys))), max(ys))
    x_end, y_start, y_end = max(xs), y_ticks[0], max(ys)

    def pixel(x: float, y: float) -> tuple[float, float]:
        across = (x - 0.0) / x_end
        up = (y - y_start) / (y_end - y_start)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    elements = [f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>"]
    for tick in y_ticks:
        _, y = pixel(0, tick)
        elements.append(f"<path d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}' stroke='#e4e4e4'/>")
        elements.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end' {STYLE}>{tick:g}</text>")
    for tick in x_ticks:
        x, y = pixel(tick, y_start)
        elements.append(f"<text x='{x:.1f}' y='{y + 18:.1f}' text-anchor='middle' {STYLE}>{tick:g}</text>")
    for number, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (pixel(*point) for point in points))
        elements.append(
            f"<polyline points='{path}' fill='none' stroke='{COLOURS[name]}' stroke-width='1.8'/>"
        )
        at = TOP + 16 + 20 * number
        elements.append(f"<path d='M{WIDTH - 150} {at - 4}h24' stroke='{COLOURS[name]}' stroke-width='3'/>")
        elements.append(f"<text x='{WIDTH - 118}' y='{at}' {STYLE}>{name}</text>")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    elements.append(
        f"<text x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 12}' text-anchor='middle' {STYLE}>{x_label}</text>"
    )
    rotation = f"transform='rotate(-90 18 {middle})'"
    elements.append(f"<text x='18' y='{middle}' text-anchor='middle' {rotation} {STYLE}>{y_label}</text>")
    body = "\n".join(elements)
    title = f"<title>{y_label} by {x_label}</title>"
    size = f"viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size}>\n{title}\n{body}\n</svg>\n"


def ticks(start: float, end: float) -> list[float]:
    """At most eight round numbers from `start` to `end`."""
    steps = [base * 10.0**power for power in range(-2, 7) for base in (1, 2, 5)]
    step = next(step for step in steps if (end - start) / step <= 8)
    return [start + step * i for i in range(int((end - start) / step) + 1)]


def smoothed(points: Points, count: int) -> Points:
    """`points` averaged over at most `count` groups of neighbours."""
    size = max(1, len(points) // count)
    edges = [*range(0, len(points), size), len(points)]
    groups = [points[first:last] for first, last in pairwise(edges) if last > first]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
