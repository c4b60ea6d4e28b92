"""Noise schedule, sampler, the two passes of UltraPixel, sizes, and what training draws.

(arXiv 2306.00637 and 2407.02158; gdf/ of Stability-AI/StableCascade@7a7d341f, MIT.) Variance preserving: x = a * clean
+ b * noise with a^2 + b^2 = 1. `t` runs from 1 (noise) to 0; `logsnr` = log(a^2 / b^2) names the noise level;
`timestep` is what the networks are conditioned on: the t at which the unshifted schedule has that logsnr, 0.99358 and
not 1 at the start.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..family import Callback, Noise
from ..objective import loss
from ..objective.timesteps import TimestepDraws

KEPT_TIMESTEP = 0.05
"""The noise level of the features that the guide was trained on."""
RESCALE = 0.7
DRAWN = "uniform"  # the distribution of t in training
LEAST_T = 0.001  # that is drawn
LOGSNR_RANGE = (-10.0, 10.0)  # of the adaptive loss weight's buckets
WEIGHT_RANGE = (1e-7, 1e7)  # of the adaptive loss weight

AfterStep = Callable[[Tensor, Tensor], Tensor]
"""(x, its logsnr) -> x, after each step."""


@dataclass(frozen=True)
class CosineDiffusion:
    """The cosine schedule of Stable Cascade as a `family.Diffusion`, whose times are t; in float32 as the networks were
    trained: 1 - 0.9999 is inexact. It is that of Stage C and of Stage B. UltraPixel draws in two passes
    (`sample_guided`), of which `sample` is one."""

    shift: float = 1.0
    """Larger: more noise at the same t."""
    offset: float = 0.008
    clamp: tuple[float, float] = (0.0001, 0.9999)

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} must be positive.")
        if not 0 < self.clamp[0] < self.clamp[1] < 1:
            raise ValueError(f"clamp={self.clamp} must be two rising numbers inside (0, 1).")

    def _first(self, like: Tensor) -> tuple[Tensor, Tensor]:
        offset = torch.tensor(self.offset, device=like.device)
        return offset, torch.cos(offset / (1 + offset) * torch.pi * 0.5) ** 2

    def _unshifted(self, t: Tensor) -> Tensor:
        offset, first = self._first(t)
        share = torch.cos((offset + t.clamp(0, 1)) / (1 + offset) * torch.pi * 0.5).clamp(0, 1) ** 2 / first
        share = share.clamp(*self.clamp)
        return (share / (1 - share)).log()

    def logsnr(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape. A shift moves all, but not beyond what the unshifted schedule has at its ends."""
        t = t.float()
        low, high = self._unshifted(torch.tensor([1.0, 0.0], device=t.device)).tolist()
        return (self._unshifted(t) + 2 * math.log(1 / self.shift)).clamp(low, high)

    def timestep(self, logsnr: Tensor) -> Tensor:
        """Timestep that the networks are conditioned on, in [0, 1]."""
        offset, first = self._first(logsnr)
        return (logsnr.sigmoid() * first).sqrt().acos() / (torch.pi * 0.5) * (1 + offset) - offset

    def steps(self, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
        """The logsnr of each of `steps` steps and of the end: (steps + 1,). start < 1 for a part of the noise."""
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        return self.logsnr(torch.linspace(start, end, steps + 1))

    # --- t: (B,) in [0, 1]

    def draw(self, batch: int, rng: torch.Generator | None = None, draws: TimestepDraws | None = None) -> Tensor:
        """Uniform in (0, 1], at least LEAST_T, on the generator's device; other draws on the CPU."""
        if draws is not None:
            return draws.draw(batch, rng).float().clamp(LEAST_T, 1.0)
        device = None if rng is None else rng.device
        return (1 - torch.rand(batch, generator=rng, device=device)).add(LEAST_T).clamp(LEAST_T, 1.0)

    def network_timestep(self, t: Tensor) -> Tensor:
        return self.timestep(self.logsnr(t))

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return add_noise(clean, noise, self.logsnr(t))

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def denoised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return denoised(x, eps, self.logsnr(t))

    def loss(self, eps: Tensor, clean: Tensor, noise: Tensor, t: Tensor, objective: loss.Objective = loss.RELEASED,
             cells: Tensor | None = None) -> Tensor:
        snr = self.logsnr(t).exp()
        errors = objective.errors(eps.float() - noise, t, snr)
        return objective.weighted(loss.mean(errors, cells), snr, "eps")

    def sample(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, logsnrs: Tensor, noise: Noise,
               callback: Callback | None = None, eta: float = 1.0, after_step: AfterStep | None = None) -> Tensor:
        """The last estimate of the clean latent, not the x after the last step. See `run`."""
        return self.run(predict, x, logsnrs, noise, callback, eta, after_step)[1]

    def run(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, logsnrs: Tensor, noise: Noise,
            callback: Callback | None = None, eta: float = 1.0,
            after_step: AfterStep | None = None) -> tuple[Tensor, Tensor | None]:
        """Step x (B, C, H, W) from logsnrs[0] to logsnrs[-1]. Returns x and the last step's estimate of the clean
        latent. predict(x, timestep (B,)) -> eps, guidance inside; logsnrs: rising, of `steps`."""
        clean, levels = None, logsnrs.to(x.device)  # moved at once: each move to a GPU is something that it waits for
        timesteps = [self.timestep(logsnr) for logsnr in logsnrs[:-1]]
        timesteps = torch.stack(timesteps).to(x.device) if timesteps else ()
        for i, following in enumerate(logsnrs[1:]):
            eps = predict(x, timesteps[i].expand(x.shape[0]))
            clean = denoised(x, eps, levels[i])
            if callback is not None:
                callback(i, x, clean)
            x = ddpm_step(clean, eps, levels[i], levels[i + 1], noise(i, x.shape).to(x), eta)
            if after_step is not None:
                x = after_step(x, following)
        return x, clean


def scales(logsnr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of x = a * clean + b * noise, shaped to multiply `like`. logsnr: a number or (B,)."""
    a_squared = logsnr.to(like.device).sigmoid()
    a, b = a_squared.sqrt(), (1 - a_squared).sqrt()
    if logsnr.ndim:
        a, b = (s.view(-1, *[1] * (like.ndim - 1)) for s in (a, b))
    return a, b


def add_noise(clean: Tensor, noise: Tensor, logsnr: Tensor) -> Tensor:
    a, b = scales(logsnr, clean)
    return a * clean + b * noise


def denoised(x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    a, b = scales(logsnr, x)
    return (x - b * eps) / a


def ddpm_step(clean: Tensor, eps: Tensor, logsnr: Tensor, following: Tensor, noise: Tensor, eta: float = 1.0) -> Tensor:
    """One step, from one noise level to the `following`. eta 1: DDPM, 0: DDIM. Noise is added in the last step too.

    sigma = eta * (b'/b) * sqrt(1 - a^2/a'^2); x' = a' clean + sqrt(b'^2 - sigma^2) eps + sigma noise
    """
    (a, b), (a_next, b_next) = scales(logsnr, clean), scales(following, clean)
    sigma = eta * (b_next**2 / b**2).sqrt() * (1 - a**2 / a_next**2).sqrt()
    return a_next * clean + (b_next**2 - sigma**2).sqrt() * eps + sigma * noise


def guided(cond: Tensor, uncond: Tensor, cfg: float, rescale: float = RESCALE, whole_batch: bool = False) -> Tensor:
    """Classifier-free guidance, by `rescale` brought to the standard deviation of `cond` (arXiv 2305.08891, 3.4).

    cond, uncond: (B, C, H, W). The deviation is that of each image; whole_batch: of all of them together, as the
    reference has it, where a batch changes its images.
    """
    eps = torch.lerp(uncond, cond, cfg)
    if rescale <= 0:
        return eps
    over = tuple(range(0 if whole_batch else 1, eps.ndim))
    ratio = cond.std(over, keepdim=True) / (eps.std(over, keepdim=True) + 1e-9)
    return rescale * (eps * ratio) + (1 - rescale) * eps


def kept_step(diffusion: CosineDiffusion, logsnrs: Tensor) -> int:
    """The step of the low-resolution pass whose features are kept: the one whose timestep is nearest to
    KEPT_TIMESTEP.

    With the 20 steps of the release it is the last one.
    """
    return (diffusion.timestep(logsnrs[:-1]) - KEPT_TIMESTEP).abs().argmin().item()


def sample_features(predict, features, x, diffusion: CosineDiffusion, logsnrs, noise: Noise, keep: int | None = None,
                    **options):
    """The low-resolution pass: `CosineDiffusion.run` until step `keep`, by default `kept_step`, and there
    features(x, timestep (B,)).

    It ends with that: nothing that it would still change is used.
    """
    keep = kept_step(diffusion, logsnrs) if keep is None else keep
    if not 0 <= keep < len(logsnrs) - 1:
        raise ValueError(f"keep={keep} is not one of the steps 0 to {len(logsnrs) - 2}.")
    x, _ = diffusion.run(predict, x, logsnrs[: keep + 1], noise, **options)
    return features(x, diffusion.timestep(logsnrs[keep]).to(x.device).expand(x.shape[0]))


def sample_guided(
    predict_low: Callable[[Tensor, Tensor], Tensor],
    features_low: Callable[[Tensor, Tensor], object],
    predict_high: Callable[[Tensor, Tensor, object | None], Tensor],
    x_low: Tensor,
    x_high: Tensor,
    diffusion: CosineDiffusion,
    logsnrs: Tensor,
    noise_low: Noise,
    noise_high: Noise,
    keep: int | None = None,
    guide_steps: int | None = None,
    **high,
) -> Tensor:
    """Both passes of UltraPixel (arXiv 2407.02158). Returns the clean high-resolution latent.

    predict_low and features_low: see `sample_features`; predict_high(x, timestep, features) -> eps, features None where
    unguided. x_low, x_high: noise of the two sizes, each with noise of its own for the steps. guide_steps: number
    of guided steps; the reference stops after 20; None: all. keep: None for `kept_step`; the
    reference takes the last step, whatever its noise level. high: what `CosineDiffusion.sample` takes beside.
    """
    features = sample_features(predict_low, features_low, x_low, diffusion, logsnrs, noise_low, keep)
    step = iter(range(len(logsnrs) - 1))

    def predict(x, timestep):
        return predict_high(x, timestep, features if guide_steps is None or next(step) < guide_steps else None)

    return diffusion.sample(predict, x_high, logsnrs, noise_high, **high)


# --- Sizes

COMPRESSION_C = 42.67  # pixels to a cell
COMPRESSION_A = 4.0
LOW_SIDE = 32  # low-resolution pictures have the area of a square of this many times 32 pixels


@dataclass(frozen=True)
class Sizes:
    """(height, width) of the latents, in cells, and of the low-resolution pass, in pixels and in cells."""

    stage_c: tuple[int, int]
    stage_b: tuple[int, int]
    low_pixels: tuple[int, int]
    low: tuple[int, int]


def sizes(
    height: int, width: int, compression_c: float = COMPRESSION_C, compression_a: float = COMPRESSION_A,
    low_side: int = LOW_SIDE,
) -> Sizes:
    """The sizes for a picture of height x width pixels. For Stage B both must be multiples of 8, see `stage_b`."""

    def cells(pixels, compression):
        return tuple(math.ceil(p / compression) for p in pixels)

    low = (int(low_side * math.sqrt(height / width)) * 32, int(low_side / math.sqrt(height / width)) * 32)
    return Sizes(cells((height, width), compression_c), cells((height, width), compression_a), low,
                 cells(low, compression_c))


# --- Training

def p2_weight(logsnr: Tensor) -> Tensor:
    """Weights of the loss that favour noise (arXiv 2204.00227), with k and gamma of 1."""
    return (1 + logsnr.exp()) ** -1.0


class AdaptiveLossWeight:
    """One over a running mean of the loss at this noise level. losses: (buckets,) float32, to be kept with a run."""

    def __init__(self, buckets: int = 300):
        self.edges = torch.linspace(*LOGSNR_RANGE, buckets - 1)
        self.losses = torch.ones(buckets)

    def weight(self, logsnr: Tensor) -> Tensor:
        """Weights (B,) of the losses at these noise levels (B,)."""
        losses = self.losses[torch.searchsorted(self.edges, logsnr.detach().float().cpu())]
        return (1 / losses).clamp(*WEIGHT_RANGE).to(logsnr.device)

    def update(self, logsnr: Tensor, loss: Tensor, beta: float = 0.99):
        """Update the running means. Of several samples in one bucket only one counts, as in the reference."""
        bucket = torch.searchsorted(self.edges, logsnr.detach().float().cpu())
        self.losses = self.losses.clone()
        self.losses[bucket] = self.losses[bucket] * beta + loss.detach().float().cpu() * (1 - beta)
