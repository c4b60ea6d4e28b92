"""Losses of training. timestep: (B,) whole; in float32, differentiable in the predictions."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...objective.loss import mean
from .schedule import NoiseSchedule, column, columns, posterior

SNR_LOSS_TIMESTEP = 249


@dataclass(frozen=True)
class IddpmLoss:
    """Parts of the loss, (B,) each. The trainer takes the mean of `total`."""

    mse: Tensor
    vb: Tensor
    """The loss of the variance, in bits per value. Its gradient reaches the logits, not eps."""

    @property
    def total(self) -> Tensor:
        return self.mse + self.vb


def iddpm_loss(
    eps: Tensor,
    logits: Tensor | None,
    sample: Tensor,
    noise: Tensor,
    timestep: Tensor,
    schedule: NoiseSchedule,
    snr: bool = False,
) -> IddpmLoss:
    """L_hybrid with the weight 1 for its second part (arXiv 2102.09672, eq. 16 has 0.001), as PixArt was trained.

    eps, logits: the network's two halves at schedule.add_noise(sample, noise, timestep), (B, C, H, W) each; without
    logits vb is 0. snr: learn the sample instead of the noise up to timestep 249 (`snr_loss`; not Min-SNR).
    """
    eps, sample, noise = eps.float(), sample.float(), noise.float()
    noisy = schedule.add_noise(sample, noise, timestep)
    mse = mean(eps_difference(eps, sample, noise, noisy, timestep, schedule, snr).square())
    if logits is None:
        return IddpmLoss(mse, torch.zeros_like(mse))
    return IddpmLoss(mse, variance_bound(eps.detach(), logits.float(), sample, noisy, timestep, schedule))


def eps_difference(eps: Tensor, sample: Tensor, noise: Tensor, noisy: Tensor, timestep: Tensor,
                   schedule: NoiseSchedule, snr: bool = False) -> Tensor:
    """What eps gets wrong, (B, C, H, W). snr: see `iddpm_loss`."""
    if not snr:
        return noise - eps
    late = column(timestep <= SNR_LOSS_TIMESTEP, eps)
    return torch.where(late, sample - schedule.denoised(noisy, eps, timestep), noise - eps)


def variance_bound(eps: Tensor, logits: Tensor, sample: Tensor, noisy: Tensor, timestep: Tensor,
                   schedule: NoiseSchedule, cells: Tensor | None = None) -> Tensor:
    """KL divergence of the true step down from `timestep` and the predicted one, in bits per value: (B,). cells: what
    each cell counts, (B, 1, H, W).

    At timestep 0 the negative log likelihood of the sample, in bins of 1/255 around it with open ends at -1 and 1, as
    if it were pixels: the released weights were trained on that.
    """
    now = timestep.detach().cpu().double()
    from_sample, from_x, _, high = posterior(schedule, now, now - 1)
    low = posterior(schedule, now.clamp(min=1), now.clamp(min=1) - 1)[2]  # at 0 it is 0: the next one is used
    low, high, from_sample, from_x, scale, sigma = columns(
        (low.log(), high.log(), from_sample, from_x, 1 / schedule.alpha(now), schedule.sigma(now)), eps, eps.dtype)

    share = (logits + 1) / 2
    log_variance = share * high + (1 - share) * low
    # Not schedule.denoised: the logarithm of a difference of float32 at timestep 0 shows every rounding before it.
    denoised = scale * noisy - sigma * eps
    off = from_sample * (sample - denoised)  # of the means
    kl = (log_variance - low - 1 + torch.exp(low - log_variance) + off.square() * torch.exp(-log_variance)) / 2
    nll = -_log_likelihood(sample, from_sample * denoised + from_x * noisy, log_variance / 2)
    bound = torch.where(column(timestep == 0, eps), nll, kl)
    return mean(bound, cells) / math.log(2)


def _log_likelihood(sample: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log likelihood of the bin of width 2/255 around each value, elementwise. (diffusion_utils.py)"""
    sharpness = torch.exp(-log_std)
    above = _normal_cdf(sharpness * (sample - mean + 1 / 255))
    below = _normal_cdf(sharpness * (sample - mean - 1 / 255))
    inside = torch.where(sample < -0.999, above, torch.where(sample > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def eps_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """(B,) squared error: of the network that follows the student of DMD, and of LoRAs by the diffusers scripts."""
    return (eps.float() - noise.float()).square().flatten(1).mean(1)
