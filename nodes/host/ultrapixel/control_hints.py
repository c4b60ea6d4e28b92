"""Hints for the ControlNets of Stable Cascade, which core loads and applies."""
from __future__ import annotations

import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ....models_impl.annotators.canny import RESIZE, canny
from ....models_impl.annotators.resize import bounded
from ..common.pictures import check_mask, colours

FILTERS = {"reference": RESIZE, "fine": None}  # the side of the square at which edges are detected
SHORT_SIDE = 768
"""Pixels of the shorter side of a hint in the release; core scales a hint to 32 pixels for each cell of the
low-resolution pass, 768 for 24."""


def canny_hint(image: Tensor, filter: str, low: float, high: float) -> Tensor:
    """An IMAGE -> white edges on black (B, h, w, 3), the shorter side 768."""
    pixels = colours(image).movedim(-1, 1)
    height, width = pixels.shape[-2:]
    size = bounded(*(int(SHORT_SIDE * side / min(height, width)) for side in (height, width)),  # torchvision's rounding
                   (height, width))
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return canny(pixels, low, high, FILTERS[filter]).movedim(1, -1).repeat(1, 1, 1, 3)


def inpaint_hint(image: Tensor, mask: Tensor) -> Tensor:
    """An IMAGE and a mask (B, h, w), 1 where to paint -> (B, H, W, 4): the picture, white there, and the mask."""
    image = colours(image)
    check_mask(mask)
    mask = comfy.utils.common_upscale(mask.reshape(-1, 1, *mask.shape[-2:]), *image.shape[2:0:-1], "nearest-exact", "")
    mask = comfy.utils.repeat_to_batch_size(mask, len(image)).movedim(1, -1).round()
    return torch.cat((torch.where(mask > 0, 1.0, image), mask), dim=-1)
