"""The noise of PixArt by timestep, and what a prediction means at one."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..config import PixArtConfig

CLEAN = -1.0  # the timestep without noise
TRAIN_TIMESTEPS = 1000
ZERO_SNR_ALPHA = 2.0**-12  # as diffusers: sigma 4096 instead of infinity


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise level by timestep: log(alpha) is linear between whole timesteps (NoiseScheduleVP).

    Methods take a float and give one, or take a tensor and give one of its shape, float32 or, for float64, float64.
    With zero terminal SNR (arXiv 2305.08891, algorithm 1) alpha at the last timestep is ZERO_SNR_ALPHA and not 0: an
    eps predictor says nothing about the sample there, and the samplers divide by it.
    """

    kind: str = "linear"
    steps: int = TRAIN_TIMESTEPS
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = False

    @classmethod
    def of(cls, config: PixArtConfig) -> NoiseSchedule:
        """The schedule that a checkpoint was trained on."""
        return cls(config.schedule, TRAIN_TIMESTEPS, config.beta_start, config.beta_end, config.zero_terminal_snr)

    def __post_init__(self):
        if self.kind not in ("linear", "scaled_linear"):
            raise ValueError(f"The noise schedule {self.kind!r} is not one of linear, scaled_linear.")
        if self.steps < 2:
            raise ValueError(f"A noise schedule of steps={self.steps} is too short; PixArt has {TRAIN_TIMESTEPS}.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} must rise from above 0 to below 1."
            )

    @cached_property
    def betas(self) -> Tensor:
        """(steps,) float64"""
        if self.zero_terminal_snr:
            before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
            return 1 - self.alphas_cumprod / before
        return self._plain_betas

    @property
    def _plain_betas(self) -> Tensor:
        if self.kind == "scaled_linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64).square()
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at the whole timesteps, (steps,) float64; with zero terminal SNR the last one is 0."""
        cumprod = (1 - self._plain_betas).cumprod(0)
        if not self.zero_terminal_snr:
            return cumprod
        alphas = cumprod.sqrt()
        return ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))).square()

    @cached_property
    def _log_alphas(self) -> Tensor:
        """log(alpha) at CLEAN, 0, 1, ... steps - 1."""
        logs = self.alphas_cumprod.clamp(min=ZERO_SNR_ALPHA**2 if self.zero_terminal_snr else 0).log() / 2
        return torch.cat([torch.zeros(1, dtype=torch.float64), logs])

    # --- How much noise

    def log_alpha(self, timestep):
        return _same_kind(self._log_alpha, timestep)

    def alpha(self, timestep):
        """The share of the sample in the state."""
        return _same_kind(lambda t: self._log_alpha(t).exp(), timestep)

    def std(self, timestep):
        """The share of the noise in the state."""
        return _same_kind(lambda t: (-torch.expm1(2 * self._log_alpha(t))).sqrt(), timestep)

    def sigma(self, timestep):
        """std / alpha"""
        return _same_kind(lambda t: torch.expm1(-2 * self._log_alpha(t)).sqrt(), timestep)

    def timestep(self, sigma):
        """The inverse of `sigma`; more noise than at the last timestep counts as the last timestep."""
        return _same_kind(self._timestep, sigma)

    def _log_alpha(self, timestep: Tensor) -> Tensor:
        place = timestep.clamp(CLEAN, self.steps - 1) + 1
        low = place.floor().long().clamp(max=self.steps - 1)
        return torch.lerp(self._log_alphas[low], self._log_alphas[low + 1], place - low)

    def _timestep(self, sigma: Tensor) -> Tensor:
        falling = self._log_alphas
        log_alpha = (-torch.log1p(sigma.square()) / 2).clamp(min=falling[-1].item())
        low = torch.searchsorted(-falling, -log_alpha, right=True).clamp(1, self.steps) - 1
        return low - 1 + (log_alpha - falling[low]) / (falling[low + 1] - falling[low])

    def sigmas(self, timesteps: Sequence[float]) -> Tensor:
        """A list of timesteps as ComfyUI's SIGMAS: (len(timesteps),) float32, 0 at CLEAN."""
        return torch.tensor([self.sigma(t) for t in timesteps])

    def timesteps(self, sigmas: Tensor) -> list[float]:
        """The inverse of `sigmas`. What is whole but for the rounding of float32 (1e-4) becomes whole."""
        exact = [self.timestep(float(s)) for s in sigmas]
        return [float(round(t)) if abs(t - round(t)) < 1e-4 else t for t in exact]

    # --- What a prediction means. x, noise, eps, velocity: (B, C, H, W)
    # timestep: a number, then the result has x's dtype; or (B,), then it has at least float32

    def add_noise(self, sample: Tensor, noise: Tensor, timestep) -> Tensor:
        return self._like(self.alpha, timestep, sample) * sample + self._like(self.std, timestep, sample) * noise

    def denoised(self, x: Tensor, eps: Tensor, timestep) -> Tensor:
        return (x - self._like(self.std, timestep, x) * eps) / self._like(self.alpha, timestep, x)

    def velocity(self, sample: Tensor, noise: Tensor, timestep) -> Tensor:
        """Target of a v-prediction network: alpha * noise - std * sample (arXiv 2202.00512, appendix D)."""
        return self._like(self.alpha, timestep, sample) * noise - self._like(self.std, timestep, sample) * sample

    def denoised_from_velocity(self, x: Tensor, velocity: Tensor, timestep) -> Tensor:
        """Finite for every timestep: nothing is divided."""
        return self._like(self.alpha, timestep, x) * x - self._like(self.std, timestep, x) * velocity

    def eps(self, x: Tensor, velocity: Tensor, timestep) -> Tensor:
        """The eps that a velocity implies; finite for every timestep. At zero SNR it is x itself, whatever the
        velocity: float32 keeps three digits of the sample there."""
        return self._like(self.std, timestep, x) * x + self._like(self.alpha, timestep, x) * velocity

    def eps_from_denoised(self, x: Tensor, denoised: Tensor, timestep) -> Tensor:
        """The inverse of `denoised`. Not at CLEAN."""
        return (x - self._like(self.alpha, timestep, x) * denoised) / self._like(self.std, timestep, x)

    def snr(self, timestep: Tensor) -> Tensor:
        """The signal-to-noise ratio, of squares, (B,)."""
        return self.sigma(timestep) ** -2

    def _like(self, coefficient, timestep, x: Tensor):
        if not isinstance(timestep, Tensor):
            return coefficient(float(timestep))
        value = coefficient(timestep.double() if x.dtype == torch.float64 else timestep)
        return column(value, x, state_dtype(x))


def _same_kind(formula, value):
    if not isinstance(value, Tensor):
        return formula(torch.tensor(float(value), dtype=torch.float64)).item()
    # On the CPU, because not every device has float64; cast there as well, for a copy may cast at either end.
    result = formula(value.detach().cpu().double())
    return result.to(torch.float64 if value.dtype == torch.float64 else torch.float32).to(value.device)


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def posterior(schedule: NoiseSchedule, now, then) -> tuple:
    """q(x at `then` | x at `now`, sample): the weights of sample and x in its mean, its variance, and beta."""
    kept_now, kept_then = schedule.alpha(now) ** 2, schedule.alpha(then) ** 2
    beta = 1 - kept_now / kept_then
    rest = schedule.std(then) ** 2 / schedule.std(now) ** 2
    return beta * kept_then**0.5 / (1 - kept_now), rest * (1 - beta) ** 0.5, beta * rest, beta


def half_log_snr(schedule: NoiseSchedule, timestep: float) -> float:
    """lambda of the papers; infinite at CLEAN."""
    return -math.log(schedule.sigma(timestep)) if timestep >= 0 else math.inf


def column(value: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """value (B,) as (B, 1, ...) where `like` is; cast before it is moved, for not every device has float64."""
    return value.to(dtype or value.dtype).to(like.device).view(-1, *[1] * (like.ndim - 1))


def columns(values: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """The same of several, moved together: each move to a GPU is something that it waits for."""
    return column(torch.stack(tuple(values)).flatten(), like, dtype).unflatten(0, (len(values), -1)).unbind(0)
