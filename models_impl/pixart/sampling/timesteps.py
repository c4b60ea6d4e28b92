"""Lists of timesteps, high to low: one more than steps, the last is where the sample is left."""
from __future__ import annotations

import math

from .schedule import CLEAN, TRAIN_TIMESTEPS

DMD_TIMESTEP = 400  # where the released one-step student was trained


def time_uniform(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Timesteps even in time, fractional, from the last timestep to 0: DPM-Solver++ and SA-Solver as PixArt runs them.

    0 is not CLEAN: the sample keeps noise of sigma 0.01, as in the reference.
    """
    _at_least_one(steps)
    last = 1 / train_steps  # of the times (timestep + 1) / train_steps, which begin at 1
    return [(1 + (last - 1) * i / steps) * train_steps - 1 for i in range(steps)] + [0.0]


def iddpm_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whole, evenly spread from the last timestep to 0, then CLEAN. (respace.py, one section)"""
    _at_least_one(steps, train_steps)
    if steps == 1:
        return [train_steps - 1.0, CLEAN]  # the reference's single step would be at 0, where no noise belongs
    place, kept = 0.0, []
    for _ in range(steps):  # summed up, not multiplied: halves must round as the reference's do
        kept.append(float(round(place)))
        place += (train_steps - 1) / (steps - 1)
    return [*reversed(kept), CLEAN]


def lcm_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS, origin: int = 50) -> list[float]:
    """The timesteps, of the distillation's `origin`, that a sampler of `steps` steps visits, then CLEAN."""
    if not 1 <= origin <= train_steps:
        raise ValueError(f"origin={origin} must be between 1 and the {train_steps} timesteps of training.")
    _at_least_one(steps, origin)
    kept = [k * (train_steps // origin) - 1.0 for k in range(1, origin + 1)][:: -(origin // steps)]
    return [*kept[:steps], CLEAN]


def linspace_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whole, from the last timestep towards 0, then CLEAN: diffusers' "linspace", what the PixArt pipelines use."""
    _at_least_one(steps, train_steps)
    return [*(float(round(i * ((train_steps - 1) / steps))) for i in range(steps, 0, -1)), CLEAN]


def trailing_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whole, evenly spread, beginning with the last timestep, then CLEAN: diffusers' "trailing", for zero SNR."""
    _at_least_one(steps, train_steps)
    return [*(float(round(train_steps - i * (train_steps / steps)) - 1) for i in range(steps)), CLEAN]


def one_step(start: float = DMD_TIMESTEP) -> list[float]:
    """A single step from `start`, then CLEAN: of a distribution-matched student, at the timestep of its training."""
    return [float(start), CLEAN]


def _at_least_one(steps: int, limit: float = math.inf):
    if not 1 <= steps <= limit:
        raise ValueError(f"steps={steps} must be at least 1" + (f" and at most {limit}." if limit < math.inf else "."))


SCHEDULES = {  # name -> fn(steps, train_steps)
    "reference (time-uniform)": time_uniform,
    "diffusers (linspace)": linspace_timesteps,
    "diffusers (trailing)": trailing_timesteps,
    "iddpm (respaced)": iddpm_timesteps,
    "lcm": lcm_timesteps,
}
