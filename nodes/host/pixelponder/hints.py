"""The conditions of 'Apply PixelPonder': their hints and masks, cut and padded to a picture."""
from __future__ import annotations

import logging
from dataclasses import dataclass

import comfy.controlnet
from torch import Tensor
from torch.nn import functional as F

from ....models_impl.pixelponder.model import HINT_CELL

CROP_UNSAID = 0.02  # of a hint's side that may be cut off without a warning


@dataclass(frozen=True)
class Condition:
    image: Tensor
    """(B, H, W, 3) in [0, 1]."""
    kind: str
    """Kind of hint, by the checkpoint's name."""
    strength: float = 1.0
    mask: Tensor | None = None
    """(B, H, W) in [0, 1], painted where this condition must win."""
    start: float = 0.0
    end: float = 1.0
    priority: int = 0


def spread(rows: Tensor, B: int, batched_number: int) -> Tensor:
    """Rows of a hint for a batch of prompts times pictures; a single row serves all as it is."""
    return rows if len(rows) == 1 else comfy.controlnet.broadcast_image_to(rows, B, batched_number)


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width): the middle of it in the right shape, resized without losing thin lines."""
    H, W = image.shape[-2:]
    h, w = min(H, round(W * height / width)), min(W, round(H * width / height))
    image = image[..., (H - h) // 2 : (H - h) // 2 + max(h, 1), (W - w) // 2 : (W - w) // 2 + max(w, 1)]
    if tuple(image.shape[-2:]) == (height, width):
        return image
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)


def warn_of_shape(condition: Condition, number: int, size: tuple[int, int]):
    """Warn in ComfyUI's log if the hint or its mask is of another shape than a picture with a latent of `size`."""
    height, width = (HINT_CELL * side for side in size)
    shapes = {"hint": condition.image.shape[1:3]}
    if condition.mask is not None and condition.mask.any():  # without any paint it is often a placeholder
        shapes["mask"] = condition.mask.shape[-2:]
    for what, (H, W) in shapes.items():
        kept = min(W * height, H * width) / max(W * height, H * width)
        if kept < 1 - CROP_UNSAID:
            logging.warning(f"PixelPonder: the {what} of condition {number} ({condition.kind}) is {W}x{H} pixels, the "
                            f"picture {width}x{height}: it is cut to that shape from its middle, which loses "
                            f"{1 - kept:.0%} of it.")


def hint_for(condition: Condition, size: tuple[int, int]) -> Tensor:
    """The hint (B, 3, 8 H', 8 W') in [0, 1] for a latent of `size`, whose sides are rounded up to even."""
    image = condition.image[..., :3].movedim(-1, 1).float()
    image = image if image.shape[1] == 3 else image[:, :1].expand(-1, 3, -1, -1)
    return _even(fit(image, *(HINT_CELL * side for side in size)))


def mask_for(condition: Condition, size: tuple[int, int]) -> Tensor | None:
    """The mask (B, 8 H', 8 W'), cut like the hint."""
    if condition.mask is None:
        return None
    mask = condition.mask.reshape(-1, 1, *condition.mask.shape[-2:]).float()
    return _even(fit(mask, *(HINT_CELL * side for side in size)))[:, 0]


def _even(image: Tensor) -> Tensor:
    """image padded to whole tokens, as FLUX pads a latent with an odd side."""
    down, right = (-side % (2 * HINT_CELL) for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, down), mode="replicate") if down or right else image


def labels(conditions) -> list[str]:
    """'1 canny', '2 depth', ... in the order in which they count."""
    return [f"{number} {c.kind}" for number, c in enumerate(conditions, 1)]
