"""Functions that the networks of several families share."""
from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def sinusoid(value: Tensor, channels: int = 256, exact_end: bool = False, sin_first: bool = False) -> Tensor:
    """Embedding of a scalar (arXiv 1706.03762, section 3.5): (B,) -> (B, channels) float32 as [cos | sin].

    The frequencies fall geometrically from 1 to 1/10000, which exact_end includes (diffusers' downscale_freq_shift=1)
    and which is else the next one after the last. sin_first: [sin | cos]. An odd channel at the end is zero. In float32
    whatever the network computes in, so that a timestep of 949.05 differs from 949 in half precision.
    """
    half = channels // 2
    # Frequencies and angles are rounded in this order: the fastest angle may be 10000 rad, where rounding shows.
    steps = torch.arange(half, dtype=torch.float32, device=value.device)
    frequency = torch.exp(steps * (-math.log(10000.0) / (half - exact_end)))
    angle = value.float()[:, None] * frequency
    parts = (angle.sin(), angle.cos()) if sin_first else (angle.cos(), angle.sin())
    return F.pad(torch.cat(parts, dim=-1), (0, channels % 2))


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * D) of one product -> queries, keys, values or a part of them, each (B, heads, N, D/heads)."""
    return rearrange(x, "B N (parts heads d) -> parts B heads N d", parts=parts, heads=heads).unbind(0)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens (B, h*w, p*p*C) in reading order, whose channels are last, -> (B, C, h*p, w*p). grid: (h, w)."""
    return rearrange(tokens, "B (h w) (p q C) -> B C (h p) (w q)", h=grid[0], w=grid[1], p=patch_size, q=patch_size)
