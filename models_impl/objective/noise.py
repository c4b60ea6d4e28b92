"""Noise for training that is not white, so that pictures may become darker or lighter than their mean."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PYRAMID_LEVELS = 6


def with_offset(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Offset noise (crosslabs.org/blog/diffusion-with-offset-noise): one more normal number to each channel of each
    picture. noise: (B, C, h, w); offset: (B, C, 1, 1)."""
    return noise + strength * offset


def pyramid(noise: Tensor, discount: float, shares: Sequence[float],
            draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Multi-resolution noise (J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training"; pyramid_noise_like in
    library/custom_train_functions.py of kohya-ss/sd-scripts): level i is drawn at 1/r^i of the size with r in [2, 4),
    enlarged, and counts discount^i. Brought to a deviation of 1, by each picture and not by the batch.

    noise: of one picture, (C, h, w); shares: PYRAMID_LEVELS numbers in [0, 1), of which each level's r is made; draw:
    normal numbers of a shape.
    """
    (channels, *size), total = noise.shape, noise
    for level, share in enumerate(shares):
        ratio = (2 + 2 * share) ** level
        small = tuple(max(1, int(side / ratio)) for side in size)
        total = total + discount**level * F.interpolate(draw((channels, *small))[None], tuple(size), mode="bilinear")[0]
        if 1 in small:
            break
    return total / total.std()


def perturbed(noise: Tensor, other: Tensor, strength: float) -> Tensor:
    """Input perturbation (arXiv 2301.11706): what makes the noisy state, while `noise` stays the one to predict."""
    return torch.add(noise, other, alpha=strength)
