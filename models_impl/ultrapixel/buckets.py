"""Picture sizes of training: several areas times several aspect ratios, as UltraPixel's configuration names them.

(arXiv 2407.02158; after core/data/bucketeer.py of Stability-AI/StableCascade@7a7d341f, MIT.)
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIDES = (1024, 2048, 2560, 3072, 3584, 3840, 4096, 4608)
RATIOS = (1 / 1, 1 / 2, 1 / 3, 2 / 3, 3 / 4, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1 / 6, 5 / 6, 9 / 16)
FACTOR = 32


@dataclass(frozen=True)
class Buckets:
    sides: tuple[int, ...] = SIDES
    """Sides of the squares whose areas are offered."""
    ratios: tuple[float, ...] = RATIOS
    """Width over height, each also the other way round when `both_ways`."""
    factor: int = FACTOR
    both_ways: bool = True

    @property
    def all_ratios(self) -> tuple[float, ...]:
        ratios = list(self.ratios)
        for ratio in self.ratios if self.both_ways else ():
            if 1 / ratio not in ratios:
                ratios.append(1 / ratio)
        return tuple(ratios)

    def size(self, side: int, ratio: float) -> tuple[int, int]:
        """(height, width) of about side*side pixels, whole multiples of `factor`."""
        area = side * side
        return (int(math.sqrt(area / ratio) // self.factor * self.factor),
                int(math.sqrt(area * ratio) // self.factor * self.factor))

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the bucket: the nearest ratio, then of its sizes the nearest area."""
        ratio = min(self.all_ratios, key=lambda r: abs(width / height - r))
        return min((self.size(side, ratio) for side in self.sides), key=lambda s: abs(s[0] * s[1] - height * width))


def shorter_edge(size: Sequence[int], bucket: Sequence[int]) -> int:
    """The shorter edge to which a picture of `size` is resized so that it covers `bucket` (both height, width)."""
    if (bucket[1] / bucket[0] - 1) * (size[1] / size[0] - 1) >= 0:  # both upright, or both lying
        return max(math.ceil(max(bucket) * min(size) / max(size)), min(bucket))
    return max(math.ceil(min(bucket) * max(size) / min(size)), max(bucket))
