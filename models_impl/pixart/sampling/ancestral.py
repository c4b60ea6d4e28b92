"""Ancestral sampling with the learned variance, PixArt's IDDPM."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...family import Callback, Noise
from .schedule import NoiseSchedule, posterior
from .walk import AfterStep, Predict, denoiser, points_of, walk

GUIDED_CHANNELS = 3  # the reference's IDDPM guides three of the four latent channels


def iddpm(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Ancestral sampling with the learned variance (arXiv 2102.09672, section 3.1 and eq. 15). With iddpm_timesteps.

    The logits of the variance are in [-1, 1], between the least and the greatest that a step can have. Raises
    ValueError where predict gives none.
    """
    points = points_of(timesteps, schedule)

    def step(index, x, denoised, logits):
        if logits.shape != x.shape:
            raise ValueError("IDDPM needs the variance that PixArt predicts beside the noise, and this network "
                             "predicts none: use another sampler.")
        mean_denoised, mean_x, low, high = posterior(schedule, points[index], points[index + 1])
        share = (logits + 1) / 2
        std = torch.exp((share * math.log(high) + (1 - share) * math.log(low)) / 2)
        return mean_denoised * denoised + mean_x * x + std * noise(index, x.shape).to(x)

    return walk(denoiser(predict, schedule, x.dtype), x, points, step, callback, after_step)
