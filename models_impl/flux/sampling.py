"""Rectified flow as FLUX uses it: noisy = (1 - sigma) * latent + sigma * noise, velocity = noise - latent.

The network is conditioned on sigma itself, in [0, 1]. (black-forest-labs/flux, src/flux/sampling.py; training as in
train.py of chfyfr/PixelPonder@3326c73)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BASE_TOKENS, MAX_TOKENS = 256, 4096  # sequence lengths that base_shift and max_shift belong to


def schedule(
    steps: int, tokens: int, base_shift: float = 0.5, max_shift: float = 1.15, shift: bool = True
) -> list[float]:
    """steps + 1 sigmas from 1 to 0, float32 values; the more image tokens, the more of them are large."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    sigmas = torch.linspace(1, 0, steps + 1)
    if shift:
        slope = (max_shift - base_shift) / (MAX_TOKENS - BASE_TOKENS)
        e = math.exp(slope * tokens + (base_shift - slope * BASE_TOKENS))
        sigmas = e / (e + (1 / sigmas - 1))
    return sigmas.tolist()


def add_noise(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """sigma: (B,) in [0, 1]."""
    return torch.lerp(latent, noise, _spread(sigma, latent))


def target(latent: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the network learns."""
    return noise - latent


def denoised(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of the clean latent. sigma: (B,)."""
    return noisy - velocity * _spread(sigma, noisy)


def training_sigma(normal: Tensor) -> Tensor:
    """Logit-normal sigmas in (0, 1) from standard normal numbers of the same shape."""
    return normal.sigmoid()


def loss(velocity: Tensor, latent: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each item in float32: (B,)."""
    return (velocity.float() - target(latent, noise).float()).square().flatten(1).mean(dim=1)


def step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One Euler step."""
    return x + (sigma_next - sigma) * velocity


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Sequence[float],
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Euler steps along `sigmas`, high to low.

    predict(x, timestep (B,)) -> velocity of the shape of x; noise: the state at sigmas[0]; callback(index, x before the
    step, denoised). Returns the state at sigmas[-1].
    """
    if len(sigmas) < 2 or any(a <= b for a, b in zip(sigmas, sigmas[1:], strict=False)):
        raise ValueError(f"FLUX's sigmas must fall from step to step, got {list(sigmas)}.")
    x = noise
    for index, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        timestep = x.new_full(x.shape[:1], sigma)
        velocity = predict(x, timestep)
        if callback is not None:
            callback(index, x, denoised(x, velocity, timestep))
        x = step(x, velocity, sigma, sigma_next)
    return x


def _spread(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x).view(-1, *[1] * (x.ndim - 1))
