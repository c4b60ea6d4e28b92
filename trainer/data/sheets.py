"""Pictures of a network as images, and several of them on one page."""
from __future__ import annotations

import math

import torch
from PIL import Image


def sheet(pictures: torch.Tensor) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] -> one picture."""
    B, _, H, W = pictures.shape
    columns, gap = math.ceil(math.sqrt(B)), 2
    page = Image.new("RGB", (columns * (W + gap) - gap, math.ceil(B / columns) * (H + gap) - gap), "white")
    for i, picture in enumerate(to_images(pictures)):
        page.paste(picture, (i % columns * (W + gap), i // columns * (H + gap)))
    return page


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    arrays = ((pictures.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in arrays]
