"""A drawing of rectangles and texts, as SVG or as a Pillow image: no plotting library."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
# Fonts that PNG files are drawn with, the first that is there; Pillow's own has Latin letters only.
_FONT_FILES = ("NotoSansMonoCJK-Regular.ttc", "DejaVuSansMono.ttf", "Menlo.ttc", "consola.ttf")
_PLAIN = {"␣": "_", "↵": "\\n", "⇥": "\\t", "…": "..."}


@dataclass(frozen=True)
class TextElement:
    """A text that starts, centres or ends at (x, y), the middle of its height; `upright` turns it to read upwards."""

    x: float
    y: float
    text: str
    size: float = 11
    colour: str = "#333333"
    anchor: Literal["start", "middle", "end"] = "start"
    upright: bool = False


@dataclass
class Drawing:
    """`boxes`: (x, y, width, height) by colour; `gaps` are white and lie above them. Pixels, y downwards."""

    width: int
    height: int
    title: str
    boxes: dict[str, list[tuple[float, float, float, float]]] = field(
        default_factory=dict[str, list[tuple[float, float, float, float]]]
    )
    gaps: list[tuple[float, float, float, float]] = field(
        default_factory=list[tuple[float, float, float, float]]
    )
    texts: list[TextElement] = field(default_factory=list[TextElement])

    def box(self, colour: str, x: float, y: float, width: float, height: float) -> None:
        """Add a filled rectangle."""
        self.boxes.setdefault(colour, []).append((x, y, width, height))

    def _layers(self) -> list[tuple[str, list[tuple[float, float, float, float]]]]:
        return [*self.boxes.items(), ("#ffffff", self.gaps)]

    def svg(self) -> str:
        """The drawing as an SVG document; the same drawing gives the same text."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        paths = [
            f'<path fill="{colour}" d="{"".join(f"M{x:g} {y:g}h{w:g}v{h:g}h-{w:g}z" for x, y, w, h in boxes)}"/>'
            for colour, boxes in self._layers()
            if boxes
        ]
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
                '<g shape-rendering="crispEdges">',
                *paths,
                "</g>",
                *map(_svg_text, self.texts),
                "</svg>\n",
            ]
        )

    def png(self) -> bytes:
        """The drawing as a PNG file's bytes; ImportError with the pip line if Pillow is missing."""
        try:
            from PIL import Image, ImageDraw
        except ModuleNotFoundError as error:
            raise ImportError(
                'PNG pictures need Pillow, which is not installed: pip install "monoblock[vision]"; '
                "SVG and HTML need nothing"
            ) from error
        image = Image.new("RGB", (self.width, self.height), "#ffffff")
        pen = ImageDraw.Draw(image)
        for colour, boxes in self._layers():
            for x, y, width, height in boxes:
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        fonts: dict[float, Any] = {}
        for text in self.texts:
            font = fonts.setdefault(text.size, None) or _font(text.size)
            fonts[text.size] = font
            _write(image, text, font)
        file = io.BytesIO()
        image.save(file, format="PNG")
        return file.getvalue()


def _svg_text(text: TextElement) -> str:
    # A third of the height below the middle is the line that letters stand on.
    low = text.size * 0.35
    place = f'x="{text.x:g}" y="{text.y + low:g}"'
    if text.upright:
        place = f'transform="translate({text.x + low:g} {text.y:g})rotate(-90)"'
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    return f'<text {place} font-size="{text.size:g}" fill="{text.colour}"{anchor}>{escape(text.text)}</text>'


def _font(size: float) -> Any:
    from PIL import ImageFont

    for name in _FONT_FILES:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _write(image: Any, text: TextElement, font: Any) -> None:
    from PIL import Image, ImageDraw

    words = "".join(_drawable(sign, font) for sign in text.text)
    left, _, right, _ = font.getbbox(words)
    width, height = int(right - left) + 2, round(text.size * 1.5)
    strip = Image.new("L", (width, height), 0)
    ImageDraw.Draw(strip).text((1 - left, height / 2), words, fill=255, font=font, anchor="lm")
    shift = {"start": 0.0, "middle": width / 2, "end": float(width)}[text.anchor]
    if text.upright:
        strip = strip.transpose(Image.Transpose.ROTATE_90)
        corner = (round(text.x - height / 2), round(text.y - width + shift))
    else:
        corner = (round(text.x - shift), round(text.y - height / 2))
    image.paste(Image.new("RGB", strip.size, text.colour), corner, strip)


def _drawable(sign: str, font: Any) -> str:
    """The sign, or how it is spelled where the font has no picture of it."""
    # A font draws what it lacks as it draws U+FFFF, which no font has; on signs of no size both are empty.
    if sign.isascii() or bytes(font.getmask(sign)) != bytes(font.getmask("\uffff")):
        return sign
    return _PLAIN.get(sign, f"U+{ord(sign):04X}")
