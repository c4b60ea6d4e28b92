"""[noise] and [loss] as the formulas of `models_impl.objective` take them."""
from __future__ import annotations

import torch
from torch import Tensor

from ...models_impl.objective.loss import Objective, cell_weights
from ...models_impl.objective.timesteps import TimestepDraws
from ..config.objective import TIMESTEPS
from ..config.schema import Loss, Noise
from ..data.loader import Batch


def objective(settings: Loss) -> Objective:
    return Objective(settings.kind, settings.huber_delta, settings.huber_schedule, settings.snr_gamma,
                     settings.debiased)


def cells(settings: Loss, batch: Batch, size: tuple[int, int], device: torch.device) -> Tensor | None:
    """What the error of each cell counts, (B, 1, *size) float32; None: all the same. size: of a latent."""
    if batch.mask is None:
        return None
    return cell_weights(batch.mask.to(device).float() / 255, size, settings.unmasked, settings.normalise_masks)


def draws(settings: Noise, released: str) -> TimestepDraws | None:
    """What noise levels are drawn from; None: as the release draws them. released: its distribution."""
    found = TimestepDraws(
        released if settings.timesteps == "released" else settings.timesteps, settings.mean, settings.deviation,
        settings.shift, settings.min_timestep / TIMESTEPS, settings.max_timestep / TIMESTEPS,
        tuple(settings.quarters) or TimestepDraws.quarters)
    return None if settings.timesteps == "released" and found == TimestepDraws(released) else found
