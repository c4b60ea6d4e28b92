"""Consistency models (arXiv 2310.04378): what they answer, and the sampler that goes with them."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...family import Callback, Noise
from .schedule import NoiseSchedule, column
from .walk import AfterStep, Predict, denoiser, points_of, walk

LCM_SIGMA_DATA = 0.5
LCM_TIME_SCALE = 10


def consistency(x: Tensor, denoised: Tensor, timestep) -> Tensor:
    """c_skip x + c_out denoised: what a consistency model answers (arXiv 2310.04378; lcm_scheduler.py)."""
    c_skip, c_out = consistency_weights(timestep)
    if isinstance(timestep, Tensor):
        c_skip, c_out = (column(c, x) for c in (c_skip, c_out))
    return c_skip * x + c_out * denoised


def consistency_weights(timestep):
    """(c_skip, c_out): (1, 0) at timestep 0, nearly (0, 1) elsewhere."""
    scaled = timestep * LCM_TIME_SCALE
    square = scaled**2 + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / square, scaled / square**0.5


def lcm(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2310.04378), without guidance. With lcm_timesteps.

    At CLEAN it returns the last estimate; the reference's scheduler noises that once more.
    """
    points = points_of(timesteps, schedule)
    plain = denoiser(predict, schedule, x.dtype)

    def denoise(x, timestep):
        denoised, logits = plain(x, timestep)
        return consistency(x, denoised, timestep), logits

    def step(index, x, denoised, _):
        return schedule.add_noise(denoised, noise(index, x.shape).to(x), points[index + 1])

    return walk(denoise, x, points, step, callback, after_step)
