"""Ancestral sampling with the learned variance, PixArt's IDDPM."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import NoiseSchedule, posterior
from .walk import AfterStep, Callback, Noise, points_of, walk


def iddpm(
    predict: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Ancestral sampling with the learned variance (arXiv 2102.09672, section 3.1 and eq. 15).

    predict gives (eps, variance logits), each (B, C, H, W); the logits are in [-1, 1], between the least and the
    greatest variance that a step can have.
    """
    points, dtype = points_of(timesteps, schedule), x.dtype

    def denoise(x, timestep):
        eps, logits = (part.to(x) for part in predict(x.to(dtype), timestep))
        return schedule.denoised(x, eps, timestep), logits

    def step(index, x, denoised, logits):
        mean_denoised, mean_x, low, high = posterior(schedule, points[index], points[index + 1])
        share = (logits + 1) / 2
        std = torch.exp((share * math.log(high) + (1 - share) * math.log(low)) / 2)
        return mean_denoised * denoised + mean_x * x + std * noise(index, x.shape).to(x)

    return walk(denoise, x, points, step, callback, after_step)
