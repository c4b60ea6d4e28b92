"""What the demo drew, on one page: a picture of it (`sheet`) and a file for a browser (`page`) that holds its own
pictures, so that it needs neither a network nor scripts."""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass, field
from html import escape
from string import Template

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, QUIET, WRONG = "#f3f1ec", "#23272e", "#6a6f78", "#b3261e"
ACROSS, TILE, GAP, MARGIN = 6, 184, 16, 40  # pictures beside each other; pixels
ROUND = 10
WIDTH = ACROSS * TILE + (ACROSS - 1) * GAP + 2 * MARGIN


@dataclass(frozen=True)
class Tile:
    picture: Image.Image
    lines: tuple[str, ...]
    """Caption: the first line stands out."""
    drawn: bool = True
    """Not a hint or a map."""


@dataclass
class Chapter:
    headline: str
    sentence: str
    source: str
    """The template behind it."""
    tiles: list[Tile] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def sheet(title: str, about: str, chapters: list[Chapter]) -> Image.Image:
    """One picture of the page."""
    height = paint(Image.new("RGB", (WIDTH, 1)), title, about, chapters)  # what lies outside is not painted
    canvas = Image.new("RGB", (WIDTH, height), PAPER)
    paint(canvas, title, about, chapters)
    return canvas


def paint(canvas: Image.Image, title: str, about: str, chapters: list[Chapter]) -> int:
    """Paints the page from the top; the height that it takes."""
    draw, whole = ImageDraw.Draw(canvas), WIDTH - 2 * MARGIN

    def write(text: str, x: int, y: int, size: int, colour: str, width: int) -> int:
        """Writes lines that fit into a width; the y below them."""
        font = ImageFont.load_default(size)
        for line in textwrap.wrap(text, max(1, int(width / font.getlength("n")))):
            draw.text((x, y), line, colour, font)
            y += size * 4 // 3
        return y

    y = write(title, MARGIN, MARGIN, 34, INK, whole)
    y = write(about, MARGIN, y + 4, 17, QUIET, whole)
    for chapter in chapters:
        y = write(chapter.headline, MARGIN, y + 24, 25, INK, whole)
        y = write(chapter.sentence, MARGIN, y + 2, 17, INK, whole)
        y = write(chapter.source, MARGIN, y, 15, QUIET, whole) + GAP
        for row in rows(chapter.tiles):
            x, ends = MARGIN, []
            for tile in row:
                shown = sized(tile.picture)
                canvas.paste(shown, (x, y), rounded(shown.size))
                first, *others = tile.lines
                below = write(first, x, y + TILE + 8, 16, INK, shown.width)
                for line in others:
                    below = write(line, x, below, 14, QUIET, shown.width)
                x += shown.width + GAP
                ends.append(below)
            y = max(ends) + GAP
        for failure in chapter.failures:
            y = write(failure, MARGIN, y, 17, WRONG, whole)
    return y + MARGIN - GAP


def rows(tiles: list[Tile]) -> list[list[Tile]]:
    """Tiles as they fit beside each other."""
    filled, left = [], 0
    for tile in tiles:
        width = sized(tile.picture).width
        if width > left:
            filled.append([])
            left = WIDTH - 2 * MARGIN
        filled[-1].append(tile)
        left -= width + GAP
    return filled


def sized(picture: Image.Image) -> Image.Image:
    """TILE high, as wide as its shape asks."""
    width = min(WIDTH - 2 * MARGIN, round(TILE * picture.width / picture.height))
    return ImageOps.contain(picture.convert("RGB"), (width, TILE), Image.Resampling.LANCZOS)


def rounded(size: tuple[int, int]) -> Image.Image:
    """A mask with round corners."""
    mask = Image.new("L", (size[0] * 4, size[1] * 4))  # drawn larger, for smooth corners
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, *(side - 1 for side in mask.size)), ROUND * 4, 255)
    return mask.resize(size, Image.Resampling.LANCZOS)


PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #f3f1ec; --ink: #23272e; --quiet: #6a6f78; --wrong: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --paper: #191b1f; --ink: #eceae4; --quiet: #9ba1ab; --wrong: #ff8a80 }
}
body { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem; background: var(--paper); color: var(--ink);
       font: 1.05rem/1.45 system-ui, sans-serif }
h1 { margin: 0 0 .4rem; font-size: 2.2rem; line-height: 1.15 }
h2 { margin: 2.8rem 0 .3rem; font-size: 1.5rem; line-height: 1.2 }
p { margin: 0 0 .2rem; max-width: 56rem }
.quiet, figcaption { color: var(--quiet); font-size: .9rem }
.wrong { color: var(--wrong) }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem 1rem; margin-top: 1rem }
figure { margin: 0; width: min-content }
img { display: block; height: 11.5rem; border-radius: .6rem }
img.wide { height: auto; width: 35rem; max-width: calc(100vw - 2.5rem) }
figcaption { margin-top: .4rem; line-height: 1.35; overflow-wrap: anywhere }
figcaption b { display: block; color: var(--ink); font-size: 1rem; font-weight: 600 }
</style>
<h1>$title</h1>
<p class="quiet">$about</p>
$chapters
</html>
""")
CHAPTER = Template("""\
<section>
<h2>$headline</h2>
<p>$sentence</p>
<p class="quiet">$source</p>
<div class="pictures">
$tiles
</div>
$failures
</section>""")
FIGURE = Template("""\
<figure><img class="$kind" src="data:image/png;base64,$data" alt="$words">
<figcaption><b>$first</b>$others</figcaption></figure>""")


def page(title: str, about: str, chapters: list[Chapter]) -> str:
    """The page as HTML."""
    return PAGE.substitute(
        title=escape(title),
        about=escape(about),
        chapters="\n".join(
            CHAPTER.substitute(
                headline=escape(chapter.headline),
                sentence=escape(chapter.sentence),
                source=escape(chapter.source),
                tiles="\n".join(map(figure, chapter.tiles)),
                failures="\n".join(f'<p class="wrong">{escape(failure)}</p>' for failure in chapter.failures),
            )
            for chapter in chapters
        ),
    )


def figure(tile: Tile) -> str:
    file = io.BytesIO()
    tile.picture.save(file, "PNG", optimize=True)
    first, *others = map(escape, tile.lines)
    return FIGURE.substitute(
        kind="wide" if tile.picture.width > 2 * tile.picture.height else "usual",
        data=base64.b64encode(file.getvalue()).decode(),
        words=escape(", ".join(tile.lines)),
        first=first,
        others="<br>".join(others),
    )
