"""Pictures of a network as images, and several of them on one page."""
from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw


def sheet(pictures: torch.Tensor) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] -> one picture."""
    B, _, H, W = pictures.shape
    columns, gap = math.ceil(math.sqrt(B)), 2
    page = Image.new("RGB", (columns * (W + gap) - gap, math.ceil(B / columns) * (H + gap) - gap), "white")
    for i, picture in enumerate(to_images(pictures)):
        page.paste(picture, (i % columns * (W + gap), i // columns * (H + gap)))
    return page


LINE, LEAST = 14, 96  # pixels: height of a line of text, width of the narrowest text


def captioned(texts: list[str], images: list[Image.Image]) -> Image.Image:
    """Pictures of any sizes on one page, the beginning of its text beneath each: two lines at most."""
    columns, gap = math.ceil(math.sqrt(len(images))), 4
    width, height = max(LEAST, *(one.width for one in images)), max(one.height for one in images)
    cell_w, cell_h = width + gap, height + 2 * LINE + gap
    page = Image.new("RGB", (columns * cell_w - gap, math.ceil(len(images) / columns) * cell_h - gap), "white")
    draw = ImageDraw.Draw(page)
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        x, y = i % columns * cell_w, i // columns * cell_h
        page.paste(image, (x, y))
        for line, words in enumerate(wrapped(text, draw, width, 2)):
            draw.text((x, y + image.height + line * LINE), words, fill="black")
    return page


def wrapped(text: str, draw: ImageDraw.ImageDraw, width: int, lines: int) -> list[str]:
    """At most so many lines that are no wider; the last ends in dots where there was more."""
    found, rest = [], " ".join(text.split())
    while rest and len(found) < lines:
        fits = max((n for n in range(1, min(len(rest), width) + 1) if draw.textlength(rest[:n]) <= width), default=1)
        if fits < len(rest) and len(found) < lines - 1 and " " in rest[:fits + 1]:
            fits = rest[:fits + 1].rindex(" ") or fits
        found.append(rest[:fits].strip())
        rest = rest[fits:].strip()
    if rest:
        found[-1] = found[-1][:-1] + "…"
    return found


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    arrays = ((pictures.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in arrays]
