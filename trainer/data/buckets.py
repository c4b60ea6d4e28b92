"""Pictures of one size in one batch: the sizes that there are, and where a picture goes."""
from __future__ import annotations

import math

import numpy as np

from ...models_impl.pixart import buckets as pixart
from ...models_impl.ultrapixel import buckets as ultrapixel
from ..config.schema import LARGEST_SIDE, Data

Size = tuple[int, int]  # (height, width) in pixels


def area_sizes(side: int, multiple: int, ratio: float) -> list[Size]:
    """Sizes of about side*side pixels and never more, whole multiples, up to `ratio` times as long as wide."""
    found = set()
    for short in range(multiple, min(side, LARGEST_SIDE) + 1, multiple):
        long = side * side // short // multiple * multiple
        if short <= long <= ratio * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def sizes(settings: Data) -> list[Size]:
    """Every size that a batch may have."""
    found = set()
    for side in settings.sides:
        if settings.buckets == "pixart":
            found |= set(pixart.TABLES[side].values())
        elif settings.buckets == "ultrapixel":
            rule = ultrapixel.Buckets((side,))
            found |= {rule.size(side, ratio) for ratio in rule.all_ratios}
        elif settings.buckets == "area":
            found |= set(area_sizes(side, settings.bucket_multiple, settings.bucket_ratio))
        else:
            found.add((side, side))
    return sorted(found)


def nearest(settings: Data, height: int, width: int) -> Size:
    """Where a picture goes: of every resolution the size with the nearest aspect ratio, of these the nearest area."""
    offered = []
    for side in settings.sides:
        if settings.buckets == "pixart":
            offered.append(pixart.nearest(pixart.TABLES[side], height, width)[1:])
        elif settings.buckets == "ultrapixel":
            offered.append(ultrapixel.Buckets((side,)).nearest(height, width))
        elif settings.buckets == "area":
            offered.append(min(area_sizes(side, settings.bucket_multiple, settings.bucket_ratio),
                               key=lambda s: abs(math.log(s[0] * width / (s[1] * height)))))
        else:
            offered.append((side, side))
    return min(offered, key=lambda s: abs(s[0] * s[1] - height * width))


def grouped(measures: np.ndarray, settings: Data) -> dict[Size, np.ndarray]:
    """The indices of the pictures of every size that has some. measures: (N, 2), what the pictures measure themselves;
    those of height 0 are left out."""
    kinds, which = np.unique(measures[:, 0].astype(np.int64) << 32 | measures[:, 1], return_inverse=True)
    places = [nearest(settings, *divmod(int(kind), 2**32)) if kind >> 32 else None for kind in kinds]
    shown = sorted({size for size in places if size})
    number = np.array([shown.index(size) if size else -1 for size in places], np.int32)[which]
    return {size: np.flatnonzero(number == n).astype(np.int32) for n, size in enumerate(shown)}
