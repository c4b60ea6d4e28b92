"""PixArt as a `family.Diffusion`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...family import Callback, Noise
from ...objective import loss as objectives
from ...objective.timesteps import TimestepDraws
from ..config import PixArtConfig
from .algorithms import ALGORITHMS
from .losses import IddpmLoss, eps_difference, variance_bound
from .schedule import NoiseSchedule
from .walk import AfterStep, Predict

DRAWN = "uniform"  # the distribution of timesteps in training


@dataclass(frozen=True)
class PixArtDiffusion:
    """The noise of a checkpoint, and what its network predicts of it: eps or a velocity of `channels`, and behind them
    the logits of the variance if it learned one, (B, C or 2C, H, W). Times are timesteps."""

    schedule: NoiseSchedule = NoiseSchedule()
    prediction: str = "eps"
    """Or "v", a velocity."""
    channels: int = 4

    @classmethod
    def of(cls, config: PixArtConfig) -> PixArtDiffusion:
        return cls(NoiseSchedule.of(config), config.prediction, config.in_channels)

    def draw(self, batch: int, rng: torch.Generator, draws: TimestepDraws | None = None) -> Tensor:
        """Whole timesteps, (B,) int64. draws: of levels, which are timesteps over their number."""
        steps = self.schedule.steps
        if draws is None:
            return torch.randint(steps, (batch,), generator=rng)
        level = draws.draw(batch, rng) * steps
        return (level + 1e-6).floor().long().clamp(max=steps - 1)  # 0.29 * 1000 is less than 290

    def network_timestep(self, timestep: Tensor) -> Tensor:
        return timestep

    def add_noise(self, sample: Tensor, noise: Tensor, timestep) -> Tensor:
        return self.schedule.add_noise(sample, noise, timestep)

    def target(self, sample: Tensor, noise: Tensor, timestep) -> Tensor:
        return noise if self.prediction == "eps" else self.schedule.velocity(sample, noise, timestep)

    def eps(self, x: Tensor, prediction: Tensor, timestep) -> Tensor:
        """The prediction as samplers take it: eps, and behind it the variance as it is."""
        if self.prediction == "eps":
            return prediction
        velocity, logits = prediction.tensor_split([self.channels], dim=1)
        return torch.cat([self.schedule.eps(x, velocity, timestep), logits], dim=1)

    def denoised(self, x: Tensor, prediction: Tensor, timestep) -> Tensor:
        first = prediction[:, : self.channels]
        if self.prediction == "eps":
            return self.schedule.denoised(x, first, timestep)
        return self.schedule.denoised_from_velocity(x, first, timestep)

    def losses(self, prediction: Tensor, sample: Tensor, noise: Tensor, timestep: Tensor, variance: float = 1.0,
               snr_switch: bool = False, objective: objectives.Objective = objectives.RELEASED,
               cells: Tensor | None = None, noisy: Tensor | None = None) -> IddpmLoss:
        """variance: weight of the variational bound, 0 leaves it out; snr_switch: learn the sample instead of the noise
        up to timestep 249 (eps only); cells: what each cell counts, (B, 1, h, w); noisy: the state, where it was made
        with other noise than is predicted."""
        first, logits = prediction.float().tensor_split([self.channels], dim=1)
        learned = variance and logits.shape[1]
        snr, level = self.schedule.snr(timestep), timestep / self.schedule.steps
        noisy = self.add_noise(sample, noise, timestep) if noisy is None else noisy
        if self.prediction == "eps":
            difference, eps = eps_difference(first, sample, noise, noisy, timestep, self.schedule, snr_switch), first
        else:
            difference = first - self.target(sample, noise, timestep)
            eps = self.schedule.eps(noisy, first.detach(), timestep)
        error = objectives.mean(objective.errors(difference, level, snr), cells)
        bound = torch.zeros_like(error)
        if learned:
            bound = variance_bound(eps.detach(), logits, sample, noisy, timestep, self.schedule, cells)
        return IddpmLoss(objective.weighted(error, snr, self.prediction), variance * bound)

    def loss(self, prediction: Tensor, sample: Tensor, noise: Tensor, timestep: Tensor,
             objective: objectives.Objective = objectives.RELEASED, cells: Tensor | None = None) -> Tensor:
        return self.losses(prediction, sample, noise, timestep, objective=objective, cells=cells).total

    def timesteps(self, steps: int, algorithm: str = "dpm-solver++") -> list[float]:
        """The list that an algorithm of the table is released with."""
        return ALGORITHMS[algorithm].timesteps(steps, self.schedule.steps)

    def sample(self, predict: Predict, x: Tensor, timesteps: Sequence[float], noise: Noise | None = None,
               callback: Callback | None = None, algorithm: str = "dpm-solver++", order: int = 2, eta: float = 1.0,
               after_step: AfterStep | None = None) -> Tensor:
        """predict gives eps, as `eps` makes it of what the network predicts: guidance is computed on that. See
        `algorithms.Algorithm.sample`."""
        return ALGORITHMS[algorithm].sample(predict, x, self.schedule, timesteps, noise, order, eta, callback,
                                            after_step)
