"""The film strip of a cascade: what its picture was after each stage, side by side."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

HEIGHT = 256  # pixels, about
GAP = 4


class FilmStrip:
    """Watches a cascade: keeps the clean estimate of the last step of every stage. That costs no work, and memory only
    for the pictures of the stages, a third of the last one's."""

    def __init__(self):
        self.of_size: dict[torch.Size, Tensor] = {}
        """(B, 3, H, W) in [-1, 1] by (H, W), small to large."""

    def __call__(self, clean: Tensor):
        self.of_size[clean.shape[-2:]] = clean

    @property
    def sizes(self) -> list[list[int]]:
        """[width, height] of every stage."""
        return [[size[1], size[0]] for size in self.of_size]

    def strip(self) -> Tensor:
        """(B, height, width, 3) in [0, 1]: each picture's stages from left to right, all as large as the last one,
        which is enlarged a whole number of times, or made smaller, to HEIGHT."""
        *_, (H, W) = self.of_size
        scale = HEIGHT // H if H <= HEIGHT else HEIGHT / H
        size = round(H * scale), max(1, round(W * scale))
        frames = [F.interpolate(picture.float(), size, mode="area" if picture.shape[-2] > size[0] else "nearest-exact")
                  for picture in self.of_size.values()]
        gap = frames[0].new_full((len(frames[0]), 3, size[0], GAP), -1.0)
        row = [part for frame in frames for part in (frame, gap)][:-1]
        return ((torch.cat(row, dim=-1) + 1) / 2).clamp(0, 1).movedim(1, -1).cpu()
