"""Distribution matching (arXiv 2311.18828), PixArt's DMD: the one-step sampler of its student, and its loss."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...family import Callback
from .dpm_solver import dpm_solver_pp
from .schedule import NoiseSchedule, column
from .walk import AfterStep, Predict


def dmd(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """One step of a distribution-matched student (arXiv 2311.18828). With one_step. x is white noise of variance 1, not
    scaled."""
    if len(timesteps) != 2:
        raise ValueError(f"dmd draws in one step, and this list of timesteps has {len(timesteps) - 1}.")
    return dpm_solver_pp(predict, x, schedule, timesteps, 1, callback, after_step)


@dataclass(frozen=True)
class DmdLoss:
    loss: Tensor
    """(), whose gradient with respect to `generated` is weight * direction times a constant."""
    direction: Tensor
    """Direction from the teacher's estimate to the estimate that fake_eps gives, (B, C, H, W)."""
    weight: Tensor
    """(B, 1, 1, 1)"""
    real_denoised: Tensor
    """The teacher's estimate, (B, C, H, W)."""


def dmd_loss(
    generated: Tensor, noisy: Tensor, real_eps: Tensor, fake_eps: Tensor, timestep: Tensor, schedule: NoiseSchedule
) -> DmdLoss:
    """Distribution matching (arXiv 2311.18828). Its gradient reaches only `generated`.

    noisy: add_noise(generated, noise, timestep); real_eps: the guided teacher there; fake_eps: the network that
    follows the student there. (train_pixart_dmd.py)
    """
    with torch.no_grad():
        direction = column(schedule.sigma(timestep), generated) * (real_eps - fake_eps)
        real_denoised = schedule.denoised(noisy, real_eps, timestep)
        weight = 1 / ((generated - real_denoised).abs().mean((1, 2, 3), keepdim=True) + 1e-5)
        goal = generated - weight * direction
    return DmdLoss((generated.float() - goal.float()).square().mean(), direction, weight, real_denoised)
