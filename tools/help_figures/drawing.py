"""What the pictures of help pages are drawn with: rows of pictures with words below them, and plain drawings."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

WIDE, PHOTO = 640, 560  # pixels of a finished drawing and of rows of pictures; panels show them at about half of that
GAP = 12
SMOOTH = 2  # a drawing is made this many times larger, so that its lines are smooth when it is reduced
PAPER, INK, DIM = "#20242b", "#f2efe9", "#8b98a8"
BLUES, ORANGE = ("#3d5a80", "#5f8fb0", "#98c1d9"), "#ee6c4d"
LARGE, TEXT, SMALL = 34, 24, 20  # pixels of letters
COLOURS = 64  # of a drawing's file
LARGEST, QUALITIES = 26_000, (88, 84, 80, 75, 70, 65, 60)  # bytes of a JPEG, and how it is made smaller


class Drawing:
    """A drawing of WIDE x `height` pixels, whose coordinates are those of the finished picture."""

    def __init__(self, height: int):
        self.size = (WIDE, height)
        self.image = Image.new("RGB", tuple(SMOOTH * side for side in self.size), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, colour: str = INK, size: int = TEXT, anchor: str = "la"):
        """anchor: where (x, y) lies in the text, as Pillow has it: l m r, then a (top) m s (baseline)."""
        if anchor[0] == "l":  # in this font two hyphens run into one dash
            while "--" in text:
                before, text = text[: text.index("--") + 1], text[text.index("--") + 1 :]
                self.pen.text((x * SMOOTH, y * SMOOTH), before, colour, font(size * SMOOTH), anchor)
                x += self.width_of(before, size) + 3
        self.pen.text((x * SMOOTH, y * SMOOTH), text, colour, font(size * SMOOTH), anchor)

    def width_of(self, text: str, size: int = TEXT) -> float:
        return self.pen.textlength(text, font(size * SMOOTH)) / SMOOTH

    def line(self, *points: tuple[float, float], colour: str = DIM, width: float = 2):
        self.pen.line(_scaled(points), colour, round(width * SMOOTH), "curve")

    def box(self, left: float, top: float, right: float, bottom: float, fill: str | None = None,
            outline: str | None = None, width: float = 2):
        self.pen.rectangle(_scaled([(left, top), (right, bottom)]), fill, outline, round(width * SMOOTH))

    def dot(self, x: float, y: float, colour: str, radius: float = 5, outline: str | None = None):
        ends = _scaled([(x - radius, y - radius), (x + radius, y + radius)])
        self.pen.ellipse(ends, colour, outline, 2 * SMOOTH)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = DIM):
        """Along a row, from left to right."""
        self.line(start, end, colour=colour)
        x, y = end
        self.pen.polygon(_scaled([(x, y), (x - 10, y - 6), (x - 10, y + 6)]), colour)

    def picture(self, picture: Image.Image, left: float, top: float, width: float, height: float):
        place = _scaled([(left, top), (width, height)])
        self.image.paste(enlarged(picture, place[2:]), place[:2])

    def save(self, path: Path):
        reduced = self.image.resize(self.size, Image.Resampling.LANCZOS)
        reduced.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The same wherever Pillow was built: without libraqm's shaping, which not every one has."""
    return ImageFont.load_default(size).font_variant(layout_engine=ImageFont.Layout.BASIC)


def _scaled(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    return tuple(round(value * SMOOTH) for point in points for value in point)


class Photo:
    """Rows of (picture, words below it), enlarged to one size; kept as a JPEG."""

    def __init__(self, *rows: Sequence[tuple[Image.Image, str]]):
        columns = max(map(len, rows))
        side = (PHOTO - GAP * (columns + 1)) // columns
        heights = [round(max(side * p.height / p.width for p, _ in row)) for row in rows]
        words = [SMALL + GAP if any(text for _, text in row) else 0 for row in rows]
        self.image = Image.new("RGB", (PHOTO, GAP + sum(heights) + sum(words) + GAP * len(rows)), PAPER)
        pen, top = ImageDraw.Draw(self.image), GAP
        for row, height, below in zip(rows, heights, words, strict=True):
            for i, (picture, text) in enumerate(row):
                left = GAP + i * (side + GAP)
                self.image.paste(enlarged(picture, (side, round(side * picture.height / picture.width))), (left, top))
                pen.text((left + side // 2, top + height + 4), text, INK, font(SMALL - 2), "ma")
            top += height + below + GAP

    def save(self, path: Path):
        for quality in QUALITIES:
            self.image.save(path, quality=quality, optimize=True)
            if path.stat().st_size <= LARGEST:
                break


def enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Single pixels stay visible where there are few of them."""
    few = size[0] > 6 * picture.width
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS)


def pictures(images: Tensor) -> list[Image.Image]:
    """images: (B, H, W, C) or (H, W, C) in [0, 1], of 1 or 3 channels or more, of which three are shown."""
    images = images if images.ndim == 4 else images[None]
    images = images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images[..., :3]
    return [Image.fromarray(image.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()) for image in images]


def gray(values: Tensor) -> Image.Image:
    """values: (H, W) in [0, 1]."""
    return pictures(values[..., None])[0]


def framed(picture: Image.Image, colour: str = DIM, width: int = 1) -> Image.Image:
    return ImageOps.expand(ImageOps.crop(picture, width), width, colour)


def wrapped(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
