"""Pictures of one size in one batch: the sizes that there are, and where a picture goes."""
from __future__ import annotations

import math

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
