"""The size at which an annotator looks at a picture.

The released data of PixelPonder and of most ControlNets were annotated at a "detect resolution": the shorter side is
brought to it, the edge is repeated until both sides are multiples of 64, and what was found is brought back to the
picture's size. (src/flux/annotator/util.py of chfyfr/PixelPonder)
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 64
OWN, RELEASE = 0, -1
MOST = 16384


def seen(image: Tensor, resolution: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """image: (B, C, H, W) -> the image as the annotator sees it, and what brings (B, C', h, w) back to (B, C', H, W).

    resolution: pixels of the shorter side; OWN is the picture's own size and changes nothing; RELEASE is the length of
    its longer side, as the release has it.
    """
    height, width = image.shape[-2:]
    if resolution == OWN:
        return image, lambda hint: hint
    side = max(height, width) if resolution == RELEASE else resolution
    if resolution != RELEASE and not 1 <= resolution <= MOST:
        raise ValueError(f"A detect resolution of {resolution} is outside of 1 to {MOST} (0: the picture's own, -1: "
                         "the release's).")
    scale = side / min(height, width)
    inner = bounded(round(height * scale), round(width * scale), (height, width))
    scaled = resized(image, *inner, area=True)
    padded = F.pad(scaled, (0, -inner[1] % MULTIPLE, 0, -inner[0] % MULTIPLE), mode="replicate")
    return padded, lambda hint: resized(hint[..., : inner[0], : inner[1]], height, width)


def bounded(height: int, width: int, original: tuple[int, int]) -> tuple[int, int]:
    """(height, width), if that is not more pixels than a square of MOST. original: of the picture that is brought to
    that size. Raises ValueError: a long thin picture whose shorter side is enlarged can be of any size."""
    if height * width > MOST**2:
        raise ValueError(f"A picture of {original[1]}x{original[0]} pixels would be brought to {width}x{height}, more "
                         f"than {MOST}x{MOST}. Crop it to a shape that is less elongated, or take a smaller "
                         "resolution.")
    return height, width


def resized(image: Tensor, height: int, width: int, area: bool = False) -> Tensor:
    """image resized as by OpenCV for floats: with `area` the mean of what a pixel covers, else bilinear."""
    if image.shape[-2:] == (height, width):
        return image
    import cv2

    how = cv2.INTER_AREA if area else cv2.INTER_LINEAR
    pictures = image.float().cpu().movedim(1, -1).contiguous().numpy()
    scaled = [torch.from_numpy(cv2.resize(p, (width, height), interpolation=how)).view(height, width, -1)
              for p in pictures]
    return torch.stack(scaled).movedim(-1, 1).to(image.device)
