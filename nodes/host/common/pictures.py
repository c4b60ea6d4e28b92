"""What comes in at an IMAGE input, as our nodes read it."""
from __future__ import annotations

import torch
from torch import Tensor

WHITE = {torch.uint8: 255, torch.uint16: 65535}  # of pictures in whole numbers, which some packs hand on


def colours(image: Tensor, name: str = "image") -> Tensor:
    """(B, H, W, C) in [0, 1] -> (B, H, W, 3) in float32: gray (one channel, or two with alpha) in all three, alpha left
    out. name: of the input, for errors. Raises ValueError for anything that is not a picture."""
    check(image, name)
    if not image.is_floating_point():
        image = image.float() / WHITE[image.dtype]
    image = image.float()
    return image[..., :1].expand(-1, -1, -1, 3) if image.shape[-1] < 3 else image[..., :3]


def check(image: Tensor, name: str = "image"):
    """Raise ValueError for an IMAGE without pixels, of a strange shape or dtype, or with values that are no numbers."""
    if image.layout is not torch.strided:
        raise ValueError(f"{name} is stored as {image.layout}, which is no picture. See what the node before it did.")
    if image.ndim != 4 or not 1 <= image.shape[-1] <= 4:
        raise ValueError(f"{name} has the shape {list(image.shape)}. A picture is (batch, height, width, channels), of "
                         "1 to 4 channels.")
    if not image.numel():
        raise ValueError(f"{name} has no pixels: it is {len(image)} pictures of {image.shape[2]}x{image.shape[1]}. See "
                         "what the node before it cut out.")
    if not image.is_floating_point() and image.dtype not in WHITE:
        raise ValueError(f"{name} is in {str(image.dtype).removeprefix('torch.')}. A picture holds values from 0 to 1.")
    if image.is_floating_point() and not image.isfinite().all():
        raise ValueError(f"{name} holds values that are no numbers (NaN or infinite). See what the node before it did.")


def check_mask(mask: Tensor | None, name: str = "mask"):
    """The same for a MASK, (B, H, W) or (H, W); None is no mask."""
    if mask is not None and mask.layout is not torch.strided:
        raise ValueError(f"{name} is stored as {mask.layout}, which is no mask. See what the node before it did.")
    if mask is not None and not mask.numel():
        raise ValueError(f"{name} has no pixels: its shape is {list(mask.shape)}. See what the node before it cut out.")
    if mask is not None and not mask.isfinite().all():
        raise ValueError(f"{name} holds values that are no numbers (NaN or infinite). See what the node before it did.")
