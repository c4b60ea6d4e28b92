"""A reference picture beside the one to draw: the left half of the canvas is given, the right half is painted to go
with it (scripts/pipeline_pixart_reference.py of PixArt-alpha)."""
from __future__ import annotations

import comfy.utils
import torch
from torch import Tensor

from ....models_impl.pixart.buckets import TABLES, nearest
from ..common.pictures import check, colours

FITS = ["crop", "pad with white", "stretch"]


def size(side: int, height: float, width: float) -> tuple[int, int]:
    """(height, width) in pixels of a canvas with halves of this shape: the bucket of `side` that is nearest to it, as
    the release does, so a half of 1:1 is 704 pixels at side 1024."""
    return nearest(TABLES[side], height, 2 * width)[1:]


def canvas(image: Tensor, vae, side: int, height: float, width: float, fit: str) -> dict:
    """A LATENT of two halves of about height : width each, with a mask over the right one. image: an IMAGE."""
    high, wide = size(side, height, width)
    half = fitted(colours(image).movedim(-1, 1), high, wide // 2, fit)
    picture = torch.cat([half, torch.ones_like(half)], dim=-1).movedim(1, -1)
    latent = vae.encode(picture)
    mask = torch.zeros(len(latent), 1, *latent.shape[-2:])
    mask[..., latent.shape[-1] // 2:] = 1
    return {"samples": latent, "noise_mask": mask}


def fitted(picture: Tensor, height: int, width: int, fit: str) -> Tensor:
    """(B, 3, H, W) -> (B, 3, height, width)."""
    if fit != "pad with white":
        how = "center" if fit == "crop" else "disabled"
        return comfy.utils.common_upscale(picture, width, height, "lanczos", how).clamp(0, 1)
    scale = min(height / picture.shape[-2], width / picture.shape[-1])
    inner_height, inner_width = (max(1, round(n * scale)) for n in picture.shape[-2:])
    inner = comfy.utils.common_upscale(picture, inner_width, inner_height, "lanczos", "disabled").clamp(0, 1)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    white = inner.new_ones(len(inner), 3, height, width)
    white[..., top:top + inner_height, left:left + inner_width] = inner
    return white


def right_half(picture: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W / 2, C)"""
    check(picture)
    return picture[:, :, picture.shape[2] // 2:]
