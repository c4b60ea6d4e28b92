"""Brush strokes over a picture, as the widget of 'Paint Conditions' writes them into its text, and the masks of them.

    text    = stroke; stroke; ...          in the order in which they were painted: a later one covers
    stroke  = colour size x y dx dy ...    whole numbers: a brush set down at (x, y) and then moved, step by step
    colour  = 1 to COLOURS, or 0 to erase
    size    = diameter of the brush in thousandths of the picture's shorter side
    x, y    = of GRID parts of its width and height, from the top left

Positions are relative, so that a painting fits a picture of any size.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

COLOURS = 4
GRID = 4096
LARGEST = 1000  # size
LONGEST = 65536  # characters of text, for it travels in every saved workflow
MOST = 1000  # strokes
SIDE = 2048  # pixels of the longer side that strokes are drawn at; larger masks are that, enlarged
AT_ONCE = 512  # segments of a stroke whose rows are found together


@dataclass(frozen=True)
class Stroke:
    colour: int
    size: int
    points: numpy.ndarray
    """(n, 2) int64: x, y."""


def read(text: str) -> list[Stroke]:
    """Raises ValueError for a text that is no painting, with the stroke and what is wrong in it."""
    if len(text) > LONGEST:
        raise ValueError(f"strokes has {len(text)} characters, the most is {LONGEST}: erase some of the painting, or "
                         "clear it.")
    parts = [part for part in text.split(";") if part.strip()]
    if len(parts) > MOST:
        raise ValueError(f"strokes has {len(parts)} strokes, the most is {MOST}: clear the painting and paint with a "
                         "larger brush.")
    return [_stroke(part, number) for number, part in enumerate(parts, 1)]


def _stroke(part: str, number: int) -> Stroke:
    where = f"Stroke {number} of strokes, {part.strip()[:40]!r},"
    words = part.split()
    if not all(word.isascii() and word.removeprefix("-").isdecimal() and len(word) < 7 for word in words):
        raise ValueError(f"{where} holds something else than whole numbers below a million.")
    if len(words) < 4 or len(words) % 2:
        raise ValueError(f"{where} has {len(words)} numbers. It needs a colour, a size and pairs of positions: at "
                         "least four numbers, an even count.")
    colour, size, *rest = map(int, words)
    if not 0 <= colour <= COLOURS:
        raise ValueError(f"{where} has the colour {colour}, not one of 1 to {COLOURS} or 0, which erases.")
    if not 1 <= size <= LARGEST:
        raise ValueError(f"{where} has a brush of {size} thousandths, not 1 to {LARGEST}.")
    points = numpy.array(rest, dtype=numpy.int64).reshape(-1, 2).cumsum(axis=0)
    if points.min() < -GRID or points.max() > 2 * GRID:
        raise ValueError(f"{where} leaves the picture by more than its own width or height.")
    return Stroke(colour, size, points)


def masks(strokes: list[Stroke], height: int, width: int) -> Tensor:
    """(COLOURS, height, width) float32: 1 where a colour is on top."""
    smaller = max(1.0, max(height, width) / SIDE)
    rows, columns = (max(1, round(side / smaller)) for side in (height, width))
    painted = _fit(label_map(strokes, rows, columns), height, width)
    return torch.from_numpy(painted[None] == numpy.arange(1, COLOURS + 1)[:, None, None]).float()


def label_map(strokes: list[Stroke], height: int, width: int) -> numpy.ndarray:
    """(height, width) uint8: the colour on top, 0 for none. A pixel is painted if its middle lies under the brush."""
    labels = numpy.zeros((height, width), dtype=numpy.uint8)
    for stroke in strokes:
        _draw(labels, stroke)
    return labels


def _draw(labels: numpy.ndarray, stroke: Stroke):
    height, width = labels.shape
    radius = stroke.size / 2000 * min(height, width)
    points = stroke.points * numpy.array([width, height]) / GRID
    if len(points) == 1:
        points = points.repeat(2, axis=0)
    low, high = points.min(axis=0) - radius, points.max(axis=0) + radius
    left, top = (max(0, int(side)) for side in low)
    right, bottom = min(width, int(high[0]) + 1), min(height, int(high[1]) + 1)
    if left >= right or top >= bottom:
        return
    # +1 where a row of a segment begins, -1 after its end: what sums to more than 0 is under the brush.
    edges = numpy.zeros((bottom - top, right - left + 1), dtype=numpy.int16)
    for first in range(0, len(points) - 1, AT_ONCE):
        y, begin, end = _spans(points[first : first + AT_ONCE + 1], radius, top, bottom)
        begin, end = begin.clip(left, right) - left, end.clip(left, right) - left
        numpy.add.at(edges, (y - top, begin), 1)
        numpy.add.at(edges, (y - top, end), -1)
    under = edges[:, :-1].cumsum(axis=1, dtype=numpy.int16) > 0
    labels[top:bottom, left:right][under] = stroke.colour


def _spans(points: numpy.ndarray, radius: float, top: int, bottom: int):
    """(y, first x, x after the last) of every row of pixels of every segment between neighbouring points: the pixels
    whose middle is at most `radius` away from it."""
    (xa, ya), (xb, yb) = points[:-1].T, points[1:].T
    first = numpy.ceil(numpy.minimum(ya, yb) - radius - 0.5).astype(numpy.int64).clip(top, bottom)
    last = numpy.floor(numpy.maximum(ya, yb) + radius - 0.5).astype(numpy.int64).clip(top - 1, bottom - 1)
    counts = (last - first + 1).clip(0)
    which = numpy.arange(len(counts)).repeat(counts)
    y = first[which] + numpy.arange(len(which)) - (counts.cumsum() - counts)[which]
    xa, ya, xb, yb, middle = xa[which], ya[which], xb[which], yb[which], y + 0.5
    left, right = numpy.full(len(y), numpy.inf), numpy.full(len(y), -numpy.inf)

    def reach(low, high, there):
        numpy.minimum(left, low, out=left, where=there)
        numpy.maximum(right, high, out=right, where=there)

    for cx, cy in ((xa, ya), (xb, yb)):  # the round ends
        square = radius**2 - (middle - cy) ** 2
        half = numpy.sqrt(square.clip(0))
        reach(cx - half, cx + half, square >= 0)
    dx, dy = xb - xa, yb - ya
    length = numpy.hypot(dx, dy)
    length[length == 0] = 1
    steep = dy != 0  # the two sides between the ends
    for side in (-radius, radius):
        x0, y0 = xa - side * dy / length, ya + side * dx / length
        t = numpy.divide(middle - y0, dy, out=numpy.full(len(y), -1.0), where=steep)
        x = x0 + t * dx
        reach(x, x, (t >= 0) & (t <= 1))
    there = left <= right
    begin = numpy.ceil(left[there] - 0.5).astype(numpy.int64)
    end = numpy.floor(right[there] - 0.5).astype(numpy.int64) + 1
    filled = begin < end
    return y[there][filled], begin[filled], end[filled]


def _fit(labels: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """The nearest of its pixels for each of a larger picture."""
    rows = (numpy.arange(height) + 0.5) * labels.shape[0] / height
    columns = (numpy.arange(width) + 0.5) * labels.shape[1] / width
    return labels[rows.astype(numpy.int64)][:, columns.astype(numpy.int64)]
