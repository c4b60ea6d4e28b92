"""The cascade of PixelFlow (arXiv 2504.07963, section 3): jumps between resolutions, sampling, training pairs.

Stage k runs at 1/2^(num_stages-1-k) of the full resolution. Inside it `t` goes from 0 to 1 and the state is
x_t = t * end + (1 - t) * start, where, for the same noise, end = e * sample + (1 - e) * noise and start is the same
mixture at s < e of the sample once more halved and doubled. The network predicts the velocity end - start.

Over the whole cascade the network's timestep only grows, so `sigma` = 1 - timestep/1000 falls from 1 to 0 and names
both the stage and the t in it. (scheduling_pixelflow.py, pipeline_pixelflow.py of ShoufaChen/PixelFlow@8805204)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .schedule import Schedule
from .solvers import SOLVERS, Predict
from .stages import GAMMA, Stages

NOISE_EPS = 1e-6  # keeps the reference's covariance invertible


# --- Resolutions and noise

def block_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Noise of unit variance whose four values in every 2x2 block have the correlation GAMMA. (B, C, H, W) float32

    Closed form of the reference's draw per block: the deviation from the block's mean and that mean are scaled by the
    square roots of the two eigenvalues of (1 - GAMMA + eps) I + GAMMA J. On the generator's device.
    """
    z = torch.randn(shape, generator=generator, device=None if generator is None else generator.device)
    mean = double(F.avg_pool2d(z, 2))
    return math.sqrt(1 - GAMMA + NOISE_EPS) * (z - mean) + math.sqrt(1 + 3 * GAMMA + NOISE_EPS) * mean


def block_noise_reference(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """The same distribution, number for number as the reference draws it: four scalars per block from the CPU stream.

    Slow (a million draws at 1024 px); for repeating published seeds.
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"The reference draws its noise on the CPU, this generator is one of {generator.device}: give "
                         "block_noise_reference a torch.Generator() of the CPU.")
    B, C, H, W = shape
    # Fewer than 16 values a call keep torch on its scalar path, whose stream does not depend on the size of the call.
    blocks = B * C * (H // 2) * (W // 2)
    z = torch.cat([torch.randn(4 * min(3, blocks - i), generator=generator) for i in range(0, blocks, 3)])
    return correlate(z.view(-1, 4), shape, block_covariance())


def block_covariance(gamma: float = GAMMA, eps: float = NOISE_EPS) -> Tensor:
    """(4, 4): 1 on the diagonal, gamma beside it; eps keeps it positive definite."""
    return (1 - gamma + eps) * torch.eye(4) + gamma * torch.ones(4, 4)


def correlate(z: Tensor, shape: Sequence[int], covariance: Tensor) -> Tensor:
    """White z (blocks, 4), blocks ordered (b c h w), through the Cholesky factor of a block's covariance."""
    B, C, H, W = shape
    noise = z @ torch.linalg.cholesky(covariance).T
    return rearrange(noise, "(B C h w) (p q) -> B C (h p) (w q)", B=B, C=C, h=H // 2, p=2)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour, (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def jump(x: Tensor, stage: int, noise: Tensor, stages: Stages) -> Tensor:
    """State at the start of `stage` from x, that at the end of the stage before; twice the resolution."""
    alpha, beta = stages.jump(stage)
    return alpha * double(x) + beta * noise.to(x)


# --- Sampling

@dataclass(frozen=True)
class Progress:
    """Progress that the callback is given after each step."""

    step: int
    """Index over the whole schedule."""
    steps: int
    stage: int
    x: Tensor
    denoised: Tensor


def sample(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    block_noise: Callable[[int, torch.Size], Tensor],
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Run the schedule from x, the state at its first point; white noise when that is the start of stage 0.

    block_noise(stage, shape) gives the noise of the jump into a stage. Returns the final state: the sample at the end
    of the cascade, the clean estimate for a schedule that ends early (`Schedule.clean`), or the state to hand over.
    """
    stages, done = schedule.stages, 0
    solve = SOLVERS[schedule.solver]
    clean = x
    for n, plan in enumerate(schedule.plans):
        if n:
            x = jump(x, plan.stage, block_noise(plan.stage, _doubled(x.shape)), stages)

        def report(step, x, velocity, t, plan=plan, done=done):
            nonlocal clean
            clean = stages.denoised(x, velocity, plan.stage, t)
            if callback is not None:
                callback(Progress(done + step, schedule.steps, plan.stage, x, clean))

        x = solve(predict, x, plan, stages, report)
        done += plan.steps
    if schedule.enter_next:
        stage = schedule.plans[-1].stage + 1
        return jump(x, stage, block_noise(stage, _doubled(x.shape)), stages)
    return clean if schedule.clean else x


def _doubled(shape: torch.Size) -> torch.Size:
    return torch.Size((*shape[:-2], shape[-2] * 2, shape[-1] * 2))


# --- Training

def assign_stages(
    batch: int, num_stages: int, rng: torch.Generator, weights: Sequence[float] | None = None
) -> Tensor:
    """A stage for each picture of a batch, (batch,) int64 in random order.

    Without weights, near-equal counts as in the reference (data_in1k.py); with weights, counts in proportion.
    """
    if weights is None:
        stage = torch.arange(batch) % num_stages
    else:
        share = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        place = (torch.arange(batch) + torch.rand(1, generator=rng, dtype=torch.float64)) / batch
        stage = torch.searchsorted(share / share[-1], place, right=True).clamp(max=num_stages - 1)
    return stage[torch.randperm(batch, generator=rng)]


def shrink(images: Tensor, stage: int, num_stages: int) -> Tensor:
    """Full-size pictures at the resolution of a stage: means over blocks."""
    return F.avg_pool2d(images, 2 ** (num_stages - 1 - stage))


def training_pair(images: Tensor, stage: int, t: Tensor, noise: Tensor, stages: Stages) -> tuple[Tensor, Tensor]:
    """(x_t, target velocity) of a stage.

    images: (B, C, H, W) at the resolution of the stage, in [-1, 1]; t: (B,) in [0, 1]; noise: like images, the same
    for both ends. The target is end - start.
    """
    end = torch.lerp(noise, images, stages.end[stage])
    start = torch.lerp(noise, double(F.avg_pool2d(images, 2)), stages.start[stage]) if stage else noise
    return torch.lerp(start, end, t.view(-1, 1, 1, 1).to(images)), end - start
