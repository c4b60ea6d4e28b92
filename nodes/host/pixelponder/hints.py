"""The conditions of 'Apply PixelPonder': their hints and masks, cut and padded to a picture."""
from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.controlnet
import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ....models_impl.pixelponder.model import HINT_CELL
from ..common.shown import warn

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


def chain(conditions) -> tuple[Condition, ...]:
    """The conditions that a node is given. Raises ValueError for anything else, which another pack may give."""
    if not isinstance(conditions, tuple) or not all(hasattr(one, "kind") for one in conditions):
        raise ValueError(f"conditions is of type {type(conditions).__name__}, not what 'PixelPonder Condition' gives: "
                         "connect it.")
    return conditions


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


def as_one(conditions: tuple[Condition, ...]) -> Tensor:
    """All hints and masks as one picture (B, channels, H, W) of the first hint's size: packs that cut a picture into
    tiles cut it like any ControlNet's hint."""
    first = _colours(conditions[0].image)
    size, B = first.shape[-2:], max(len(c.image) for c in conditions)
    layers = []
    for condition in conditions:
        layers.append(fit(_colours(condition.image), *size))
        if condition.mask is not None:
            layers.append(fit(_mask(condition), *size))
    layers = [comfy.utils.repeat_to_batch_size(layer, B) for layer in layers]
    return layers[0] if len(layers) == 1 else torch.cat(layers, dim=1)


def cut(conditions: tuple[Condition, ...], picture: Tensor) -> tuple[Condition, ...]:
    """The conditions with the hints and masks of a part of what `as_one` made of them.

    Raises ValueError if it has other channels.
    """
    widths = [3 if condition.mask is None else 4 for condition in conditions]
    if picture.ndim != 4 or picture.shape[1] != sum(widths):
        raise ValueError(f"A node has replaced PixelPonder's hint by a tensor of shape {tuple(picture.shape)}; it is "
                         f"(pictures, {sum(widths)}, height, width), of which tiles may be cut.")
    return tuple(replace(condition, image=part[:, :3].movedim(1, -1), mask=part[:, 3] if part.shape[1] > 3 else None)
                 for condition, part in zip(conditions, picture.split(widths, dim=1), strict=True))


def of_area(picture: Tensor, area: tuple[int, int, int, int], whole: tuple[int, int] | None) -> Tensor:
    """The part of a picture of hints for an area (height, width, y, x) of a latent of `whole` cells; without `whole`,
    of one as large as the picture of hints. Raises ValueError if the area is not inside of that."""
    h, w, y, x = area
    H, W = whole or [round(side / HINT_CELL) for side in picture.shape[-2:]]
    if y + h > H or x + w > W:
        raise ValueError(f"A prompt's area reaches to {HINT_CELL * (x + w)}x{HINT_CELL * (y + h)} pixels, and the hint "
                         f"of PixelPonder is {HINT_CELL * W}x{HINT_CELL * H}: with areas, give it hints as large as "
                         "the picture.")
    fitted = fit(picture, HINT_CELL * H, HINT_CELL * W)
    return fitted[..., HINT_CELL * y : HINT_CELL * (y + h), HINT_CELL * x : HINT_CELL * (x + w)]


def warn_of_shape(condition: Condition, number: int, size: tuple[int, int]):
    """Warn if the hint or its mask is of another shape than a picture with a latent of `size`."""
    height, width = (HINT_CELL * side for side in size)
    shapes = {"hint": condition.image.shape[1:3]}
    if condition.mask is not None and condition.mask.any():  # without any paint it is often a placeholder
        shapes["mask"] = condition.mask.shape[-2:]
    for what, (H, W) in shapes.items():
        kept = min(W * height, H * width) / max(W * height, H * width)
        if kept < 1 - CROP_UNSAID:
            warn(f"PixelPonder: the {what} of condition {number} ({condition.kind}) is {W}x{H} pixels, the picture "
                 f"{width}x{height}: it is cut to that shape from its middle, which loses {1 - kept:.0%} of it.")


def hint_for(condition: Condition, size: tuple[int, int]) -> Tensor:
    """The hint (B, 3, 8 H', 8 W') in [0, 1] for a latent of `size`, whose sides are rounded up to even."""
    return _even(fit(_colours(condition.image), *(HINT_CELL * side for side in size)))


def mask_for(condition: Condition, size: tuple[int, int]) -> Tensor | None:
    """The mask (B, 8 H', 8 W'), cut like the hint."""
    if condition.mask is None:
        return None
    return _even(fit(_mask(condition), *(HINT_CELL * side for side in size)))[:, 0]


def _colours(image: Tensor) -> Tensor:
    """(B, H, W, C), gray or with alpha too, -> (B, 3, H, W)."""
    image = image[..., :3].movedim(-1, 1).float()
    return image if image.shape[1] == 3 else image[:, :1].expand(-1, 3, -1, -1)


def _mask(condition: Condition) -> Tensor:
    """(B, 1, H, W)."""
    return condition.mask.reshape(-1, 1, *condition.mask.shape[-2:]).float()


def _even(image: Tensor) -> Tensor:
    """image padded to whole tokens, as FLUX pads a latent with an odd side."""
    down, right = (-side % (2 * HINT_CELL) for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, down), mode="replicate") if down or right else image


def labels(conditions) -> list[str]:
    """'1 canny', '2 depth', ... in the order in which they count."""
    return [f"{number} {c.kind}" for number, c in enumerate(conditions, 1)]
