"""The cascade of PixelFlow (arXiv 2504.07963, section 3): jumps between resolutions, sampling, training pairs.

Stage k runs at 1/2^(num_stages-1-k) of the full resolution. Inside it `t` goes from 0 to 1 and the state is
x_t = t * end + (1 - t) * start, where, for the same noise, end = e * sample + (1 - e) * noise and start is the same
mixture at s < e of the sample once more halved and doubled. The network predicts the velocity end - start.

Over the whole cascade the network's timestep only grows, so `sigma` = 1 - timestep/1000 falls from 1 to 0 and names
both the stage and the t in it. (scheduling_pixelflow.py, pipeline_pixelflow.py of ShoufaChen/PixelFlow@8805204)
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..family import Callback, Noise
from ..objective import loss
from ..objective.timesteps import TimestepDraws
from .schedule import CascadeSchedule
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


# --- All of it

class StageTime(NamedTuple):
    """Times in a cascade: a stage and t inside it, of one stage for all pictures or, as they are drawn, of each."""

    stage: int | Tensor
    """(B,) int64"""
    t: float | Tensor
    """In [0, 1]; (B,) float32."""

    def rows(self, rows: Tensor | slice) -> StageTime:
        """Those of some pictures."""
        return StageTime(self.stage[rows], self.t[rows])

    def by_stage(self) -> Iterator[tuple[Tensor, StageTime]]:
        """(rows, the times of these pictures, which share a stage), by rising stage; stages without pictures are left
        out."""
        for stage in sorted(set(self.stage.tolist())):
            rows = (self.stage == stage).nonzero().flatten()
            yield rows, StageTime(stage, self.t[rows])


@dataclass(frozen=True)
class CascadeFlow:
    """PixelFlow as a `family.Diffusion` whose times are `StageTime`.

    Pictures are of one stage and at its resolution, (B, C, H, W) in [-1, 1], with the same noise for both ends of the
    stage; only in training a whole batch is packed (`packing.pack`).
    """

    stages: Stages

    def draw(self, batch: int, rng: torch.Generator, draws: TimestepDraws | None = None,
             weights: Sequence[float] | None = None) -> StageTime:
        """draws: of levels in every stage, which are 1 - t; weights: of the stages, see `assign_stages`. Each t is a
        whole multiple of 1 / num_train_timesteps."""
        steps = self.stages.num_train_timesteps
        stage = assign_stages(batch, self.stages.num_stages, rng, weights)
        if draws is None:
            return StageTime(stage, torch.randint(steps, (batch,), generator=rng) / steps)
        index = ((1 - draws.draw(batch, rng)) * steps).long().clamp(max=steps - 1)
        return StageTime(stage, index / steps)

    def network_timestep(self, time: StageTime) -> Tensor:
        """Times as they are drawn, float32 on the CPU."""
        index = (time.t * self.stages.num_train_timesteps).round().long()
        grid = torch.stack([self.stages.train_timesteps(k) for k in range(self.stages.num_stages)])
        return grid[time.stage, index].float()

    def add_noise(self, clean: Tensor, noise: Tensor, time: StageTime) -> Tensor:
        return self.pair(clean, noise, time)[0]

    def target(self, clean: Tensor, noise: Tensor, time: StageTime) -> Tensor:
        """The velocity, end - start."""
        return self.pair(clean, noise, time)[1]

    def pair(self, clean: Tensor, noise: Tensor, time: StageTime) -> tuple[Tensor, Tensor]:
        """(`add_noise`, `target`). t: (B,)."""
        stage, t = time
        end = torch.lerp(noise, clean, self.stages.end[stage])
        start = torch.lerp(noise, double(F.avg_pool2d(clean, 2)), self.stages.start[stage]) if stage else noise
        return torch.lerp(start, end, t.view(-1, 1, 1, 1).to(clean)), end - start

    def denoised(self, x: Tensor, velocity: Tensor, time: StageTime) -> Tensor:
        """The clean sample at the stage's resolution; exact when halving and doubling it loses nothing."""
        stage, t = time
        return self.stages.denoised(x, velocity, stage, t.view(-1, 1, 1, 1).to(x) if isinstance(t, Tensor) else t)

    def loss(self, velocity: Tensor, clean: Tensor, noise: Tensor, time: StageTime,
             objective: loss.Objective = loss.RELEASED, cells: Tensor | None = None) -> Tensor:
        """objective: only its kind of error; an SNR is none of a stage's, whose ends are of two resolutions."""
        errors = objective.errors(velocity.float() - self.target(clean, noise, time))
        return (errors if cells is None else errors * cells).mean(dim=(1, 2, 3))

    def sample(self, predict: Predict, x: Tensor, schedule: CascadeSchedule, noise: Noise,
               callback: Callback | None = None) -> Tensor:
        """Run the schedule from x, the state at its first point; white noise when that is the start of stage 0.

        noise(stage, shape) gives the noise of the jump into a stage. Returns the final state: the sample at the end of
        the cascade, the clean estimate for a schedule that ends early (`clean`), or the state to hand over.
        """
        solve, done, clean = SOLVERS[schedule.solver], 0, x
        for n, plan in enumerate(schedule.plans):
            if n:
                x = jump(x, plan.stage, noise(plan.stage, _doubled(x.shape)), self.stages)

            def report(step, x, velocity, t, plan=plan, done=done):
                nonlocal clean
                clean = self.denoised(x, velocity, StageTime(plan.stage, t))
                if callback is not None:
                    callback(done + step, x, clean)

            x = solve(predict, x, plan, self.stages, report)
            done += plan.steps
        if schedule.enter_next:
            stage = schedule.plans[-1].stage + 1
            return jump(x, stage, noise(stage, _doubled(x.shape)), self.stages)
        return clean if schedule.clean else x
