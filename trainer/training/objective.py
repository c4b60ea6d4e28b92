"""[noise] and [loss] as the formulas of `models_impl.objective` take them."""
from __future__ import annotations

from ...models_impl.objective.loss import Objective
from ...models_impl.objective.timesteps import TimestepDraws
from ..config.objective import TIMESTEPS
from ..config.schema import Loss, Noise


def objective(settings: Loss) -> Objective:
    return Objective(settings.kind, settings.huber_delta, settings.huber_schedule, settings.snr_gamma,
                     settings.debiased)


def draws(settings: Noise, released: str) -> TimestepDraws | None:
    """What noise levels are drawn from; None: as the release draws them. released: its distribution."""
    found = TimestepDraws(
        released if settings.timesteps == "released" else settings.timesteps, settings.mean, settings.deviation,
        settings.shift, settings.min_timestep / TIMESTEPS, settings.max_timestep / TIMESTEPS,
        tuple(settings.quarters) or TimestepDraws.quarters)
    return None if settings.timesteps == "released" and found == TimestepDraws(released) else found
