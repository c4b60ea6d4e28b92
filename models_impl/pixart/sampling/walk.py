"""What all samplers share: the walk down a list of timesteps."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import CLEAN, NoiseSchedule, state_dtype

Predict = Callable[[Tensor, float], Tensor]
"""(x, timestep) -> eps, guidance already applied. A velocity becomes eps by `NoiseSchedule.eps`."""
Noise = Callable[[int, torch.Size], Tensor]
"""(index of the step, shape) -> noise."""
Callback = Callable[[int, Tensor, Tensor], None]
"""(index of the step, x, denoised), once per step; x is the state that the estimate was made from."""
AfterStep = Callable[[Tensor, "float | None"], Tensor]
"""(x, its timestep, or None after the last step of a list that ends at 0 or CLEAN) -> x. Blends in a known region."""


def walk(denoise, x, points, step, callback, after_step) -> Tensor:
    """denoise(x, timestep) -> (denoised, more); step(index, x, denoised, more) -> x at the next timestep."""
    dtype, x = x.dtype, x.to(state_dtype(x))
    for index, (now, then) in enumerate(pairwise(points)):
        denoised, more = denoise(x, now)
        if callback is not None:
            callback(index, x, denoised)
        x = step(index, x, denoised, more) if then >= 0 else denoised
        if after_step is not None:
            x = after_step(x, None if index == len(points) - 2 and then <= 0 else then)
    return x.to(dtype)


def denoiser(predict: Predict, schedule: NoiseSchedule, dtype: torch.dtype):
    """The network sees `dtype`, the solver's arithmetic stays in the state's own."""
    return lambda x, timestep: (schedule.denoised(x, predict(x.to(dtype), timestep).to(x), timestep), None)


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
