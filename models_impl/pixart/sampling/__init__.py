"""The noise of PixArt: its schedule, the samplers that undo it, and the training formulas.

A state is x = alpha * sample + std * noise with alpha^2 + std^2 = 1, and sigma = std / alpha. `timestep` is what the
network is conditioned on, any number from 0 to 999. The step before 0 is CLEAN: there alpha is 1 and sigma is 0.

Every sampler walks a list of falling timesteps, from the state at the first to the state at the last, so a schedule may
start late or be cut in two; only at CLEAN it ends with the network's estimate. After a cut a multistep solver restarts
at its first order.
(diffusion/model/{dpm_solver,sa_solver,gaussian_diffusion}.py, diffusion/lcm_scheduler.py and train_scripts/ of
PixArt-alpha/PixArt-sigma@1ce521a)
"""
from __future__ import annotations

from .algorithms import ALGORITHMS, Algorithm, guided
from .ancestral import iddpm
from .consistency import consistency_weights, lcm
from .diffusion import DRAWN, PixArtDiffusion
from .distillation import HUBER_C, LcmGrid, LcmStep, lcm_distillation
from .distribution_matching import DmdLoss, dmd, dmd_loss
from .dpm_solver import dpm_diffusers, dpm_solver_pp
from .losses import IddpmLoss, eps_loss, iddpm_loss, variance_bound
from .schedule import CLEAN, TRAIN_TIMESTEPS, NoiseSchedule
from .stochastic_adams import sa_solver
from .timesteps import (
    DMD_TIMESTEP,
    SCHEDULES,
    iddpm_timesteps,
    lcm_timesteps,
    linspace_timesteps,
    one_step,
    time_uniform,
    trailing_timesteps,
)
from .walk import AfterStep, Predict

__all__ = [
    "ALGORITHMS", "CLEAN", "DMD_TIMESTEP", "DRAWN", "HUBER_C", "SCHEDULES", "TRAIN_TIMESTEPS", "AfterStep", "Algorithm",
    "DmdLoss", "IddpmLoss", "LcmGrid", "LcmStep", "NoiseSchedule", "PixArtDiffusion", "Predict",
    "consistency_weights", "dmd", "dmd_loss", "dpm_diffusers", "dpm_solver_pp", "eps_loss", "guided", "iddpm",
    "iddpm_loss", "iddpm_timesteps", "lcm", "lcm_distillation", "lcm_timesteps", "linspace_timesteps", "one_step",
    "sa_solver", "time_uniform", "trailing_timesteps", "variance_bound",
]
