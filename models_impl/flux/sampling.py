"""Rectified flow as FLUX uses it: noisy = (1 - sigma) * latent + sigma * noise, velocity = noise - latent.

The network is conditioned on sigma itself, in [0, 1]. (black-forest-labs/flux, src/flux/sampling.py; training as in
train.py of chfyfr/PixelPonder@3326c73)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..family import Callback, Noise
from ..objective import loss
from ..objective.timesteps import TimestepDraws

LEAST_SIGMA = 1e-6  # that is drawn: at 0 the signal-to-noise ratio is infinite
DRAWN = "logit_normal"  # the distribution of sigmas in the release of PixelPonder
BASE_TOKENS, MAX_TOKENS = 256, 4096  # sequence lengths that base_shift and max_shift belong to


def training_sigma(normal: Tensor) -> Tensor:
    """Logit-normal sigmas in (0, 1) from standard normal numbers of the same shape."""
    return normal.sigmoid()


@dataclass(frozen=True)
class RectifiedFlow:
    """FLUX as a `family.Diffusion`: times are sigmas, (B,) in [0, 1]; latents have any shape (B, ...)."""

    base_shift: float = 0.5
    max_shift: float = 1.15

    def schedule(self, steps: int, tokens: int) -> list[float]:
        """steps + 1 sigmas from 1 to 0, float32 values; the more image tokens, the more of them are large."""
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        slope = (self.max_shift - self.base_shift) / (MAX_TOKENS - BASE_TOKENS)
        e = math.exp(slope * tokens + (self.base_shift - slope * BASE_TOKENS))
        return (e / (e + (1 / torch.linspace(1, 0, steps + 1) - 1))).tolist()

    def draw(self, batch: int, rng: torch.Generator, draws: TimestepDraws | None = None) -> Tensor:
        if draws is None:
            return training_sigma(torch.randn(batch, generator=rng))
        return draws.draw(batch, rng).clamp(min=LEAST_SIGMA).float()

    def network_timestep(self, sigma: Tensor) -> Tensor:
        return sigma

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(latent, noise, _spread(sigma, latent))

    def target(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The velocity, the same at every sigma."""
        return noise - latent

    def denoised(self, noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
        return noisy - velocity * _spread(sigma, noisy)

    def snr(self, sigma: Tensor) -> Tensor:
        """The signal-to-noise ratio, of squares."""
        return (1 / sigma - 1).square()

    def loss(self, velocity: Tensor, latent: Tensor, noise: Tensor, sigma: Tensor,
             objective: loss.Objective = loss.RELEASED, cells: Tensor | None = None) -> Tensor:
        target, snr = self.target(latent, noise, sigma), self.snr(sigma)
        errors = objective.errors(velocity.float() - target.float(), sigma, snr)
        return objective.weighted(loss.mean(errors, cells), snr, "flow")

    def sample(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Sequence[float],
               noise: Noise | None = None, callback: Callback | None = None) -> Tensor:
        """Euler steps along `sigmas`, high to low, from the state at the first to that at the last. Nothing is random
        on the way: noise is not asked for. predict(x, timestep (B,)) -> velocity of the shape of x."""
        if len(sigmas) < 2 or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"FLUX's sigmas must fall from step to step, got {list(sigmas)}.")
        for index, (sigma, following) in enumerate(pairwise(sigmas)):
            timestep = x.new_full(x.shape[:1], sigma)
            velocity = predict(x, timestep)
            if callback is not None:
                callback(index, x, self.denoised(x, velocity, timestep))
            x = x + (following - sigma) * velocity
        return x


def _spread(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x).view(-1, *[1] * (x.ndim - 1))
