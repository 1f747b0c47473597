"""A drawing of rectangles and text, as SVG or as a Pillow image, without a plotting library."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
# Fonts for PNG files, in order of preference; Pillow's own has Latin letters only.
_FONT_FILES = ("NotoSansMonoCJK-Regular.ttc", "DejaVuSansMono.ttf", "Menlo.ttc", "consola.ttf")
_PLAIN = {"␣": "_", "↵": "\\n", "⇥": "\\t", "…": "..."}


@dataclass(frozen=True)
class TextElement:
    """Text at (x, y), the vertical centre of its `anchor`; `upright` rotates it by 90 degrees, to read upwards."""

    x: float
    y: float
    text: str
    size: float = 11
    colour: str = "#333333"
    anchor: Literal["start", "middle", "end"] = "start"
    upright: bool = False


@dataclass
class Drawing:
    """`boxes`: (x, y, width, height) by colour; `gaps` are white and drawn above them. In pixels, y downwards."""

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
        """The drawing as an SVG document; equal drawings give equal documents."""
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
        """The drawing as the bytes of a PNG file; ImportError with the pip command if Pillow is missing."""
        try:
            from PIL import Image, ImageDraw
        except ModuleNotFoundError as error:
            raise ImportError(
                'PNG pictures need Pillow, which is not installed: pip install "monoblock[vision]"; '
                "SVG and HTML need no package"
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
    # The baseline is about a third of the font size below the middle.
    low = text.size * 0.35
    position = f'x="{text.x:g}" y="{text.y + low:g}"'
    if text.upright:
        position = f'transform="translate({text.x + low:g} {text.y:g})rotate(-90)"'
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    return (
        f'<text {position} font-size="{text.size:g}" fill="{text.colour}"{anchor}>{escape(text.text)}</text>'
    )


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

    words = "".join(_drawable(character, font) for character in text.text)
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


def _drawable(character: str, font: Any) -> str:
    """The character, or a replacement if the font has no glyph for it."""
    # Fonts draw a missing character as U+FFFF, which no font has; for characters without width both are empty.
    if character.isascii() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff")):
        return character
    return _PLAIN.get(character, f"U+{ord(character):04X}")
