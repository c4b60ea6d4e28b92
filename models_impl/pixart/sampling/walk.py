"""What all samplers share: the walk down a list of timesteps."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import CLEAN, NoiseSchedule, state_dtype

Predict = Callable[[Tensor, float], Tensor]
"""(x (B, C, H, W), timestep) -> eps of the shape of x, guidance already applied; behind it, where a network learned its
variance, the logits of that: (B, 2C, H, W). A velocity becomes eps by `NoiseSchedule.eps`."""
AfterStep = Callable[[Tensor, "float | None"], Tensor]
"""(x, its timestep, or None after the last step of a list that ends at 0 or CLEAN) -> x. Blends in a known region."""


def walk(denoise, x, points, step, callback, after_step) -> Tensor:
    """denoise: of `denoiser`; step(index, x, denoised, logits) -> x at the next timestep."""
    dtype, x = x.dtype, x.to(state_dtype(x))
    for index, (now, then) in enumerate(pairwise(points)):
        denoised, logits = denoise(x, now)
        if callback is not None:
            callback(index, x, denoised)
        x = step(index, x, denoised, logits) if then >= 0 else denoised
        if after_step is not None:
            x = after_step(x, None if index == len(points) - 2 and then <= 0 else then)
    return x.to(dtype)


def denoiser(predict: Predict, schedule: NoiseSchedule, dtype: torch.dtype):
    """(x, timestep) -> (denoised, variance logits, empty where the network has none). The network sees `dtype`, the
    solver's arithmetic stays in the state's own."""
    def denoise(x, timestep):
        eps, logits = predict(x.to(dtype), timestep).to(x).tensor_split([x.shape[1]], dim=1)
        return schedule.denoised(x, eps, timestep), logits

    return denoise


def points_of(timesteps: Sequence[float], schedule: NoiseSchedule) -> list[float]:
    """Raises ValueError for a list that no sampler can walk."""
    points = [float(t) for t in timesteps]
    if len(points) < 2 or any(a <= b for a, b in pairwise(points)):
        raise ValueError(f"A sampler needs at least two timesteps that fall from step to step, got {points}.")
    if points[0] > schedule.steps - 1 or points[-2] < 0 or points[-1] < CLEAN:
        raise ValueError(f"Timesteps lie between {schedule.steps - 1} and 0, or end with {CLEAN:g}; got {points}.")
    if CLEAN < points[-1] < 0:
        raise ValueError(f"The last timestep, {points[-1]}, is neither {CLEAN:g}, which is clean, nor at least 0.")
    return points
