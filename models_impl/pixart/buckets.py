"""The picture sizes that PixArt was trained on, by aspect ratio (diffusion/data/datasets/utils.py of PixArt-sigma).

Within a table every size has about as many tokens. The label of a size is its height/width as the release rounded it,
and the aspect ratio that a micro-conditioned network is given.
"""
from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[float, tuple[int, int]]
"""label -> (height, width) in pixels, widest first."""

WIDE_1024 = (  # (height, width) in units of 64 pixels
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16),
)  # fmt: skip
WIDE_2880 = (
    (22, 90), (22, 87), (22, 84), (22, 81), (25, 78), (25, 75), (25, 73), (28, 70), (28, 67), (30, 64), (30, 61),
    (30, 59), (33, 60), (33, 56), (36, 53), (36, 50), (39, 50), (39, 47), (42, 47), (42, 45),
)  # fmt: skip
LABELS_2880 = {0.24: 0.25, 0.25: 0.26, 0.26: 0.27, 0.27: 0.28, 4.09: 4.0}  # height/width -> what the release says
UNMIRRORED = 11  # the wide size that has no tall one
INFERENCE_DROPS = (0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88)
INFERENCE_DROPS_LARGE = (0.27, 0.28, 2.89, 3.11, 3.62, 3.75, 3.88)


def _table(wide: tuple[tuple[int, int], ...], square: int, unit: int, labels: Mapping[float, float] | None = None):
    tall = [(w, h) for i, (h, w) in enumerate(wide) if i != UNMIRRORED][::-1]
    sizes = {round(h / w, 2): (h * unit, w * unit) for h, w in (*wide, (square, square), *tall)}
    return {(labels or {}).get(label, label): size for label, size in sizes.items()}


TABLES: dict[int, Table] = {side: _table(WIDE_1024, 16, side // 16) for side in (256, 512, 1024, 2048)}
TABLES[2880] = _table(WIDE_2880, 45, 64, LABELS_2880)
"""All sizes of training, by the side of the square in pixels."""

INFERENCE_TABLES: dict[int, Table] = {
    side: {label: size for label, size in TABLES[side].items() if label not in INFERENCE_DROPS}
    for side in (256, 512, 1024)
}
for _side in (2048, 4096):
    INFERENCE_TABLES[_side] = {label: size for label, size in _table(WIDE_1024, 16, _side // 16).items()
                               if label not in INFERENCE_DROPS_LARGE}
"""The sizes that the release's own scripts offer. Their "2880" is 4096 in truth."""


def nearest(table: Table, height: float, width: float) -> tuple[float, int, int]:
    """(label, height, width) of the entry whose label is nearest to height/width, of two equally near the wider."""
    if height <= 0 or width <= 0:
        raise ValueError(f"There is no picture size for a width of {width} and a height of {height}.")
    label = min(table, key=lambda known: abs(known - height / width))
    return label, *table[label]
