"""The stages of PixelFlow's cascade: their time ranges, resolutions and timesteps (arXiv 2504.07963, section 3)."""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

TRAIN_TIMESTEPS = 1000  # of every released checkpoint
GAMMA = -1 / 3


@dataclass(frozen=True)
class Stages:
    """The time ranges of a cascade. Tuples have one entry per stage."""

    num_stages: int = 4
    gamma: float = GAMMA
    """Correlation of the noise inside a 2x2 block at a jump; -1/3 is the least that four values can have."""
    num_train_timesteps: int = TRAIN_TIMESTEPS

    def __post_init__(self):
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be at least 1.")

    @cached_property
    def origin(self) -> tuple[float, ...]:
        """Starts of the stages if resolutions did not differ. Cut to whole timesteps: 0.333, not 1/3."""
        steps = self.num_train_timesteps
        return tuple(int(steps * k / self.num_stages) / steps for k in range(self.num_stages))

    @property
    def last_t(self) -> float:
        """The grid of Euler steps ends here, and one last step of what remains follows: 0.999."""
        return 1 - 1 / self.num_train_timesteps

    @cached_property
    def end(self) -> tuple[float, ...]:
        """Share of the sample in the state at the end of each stage."""
        return (*self.origin[1:], 1.0)

    @cached_property
    def start(self) -> tuple[float, ...]:
        """Share of the sample at the start of each stage: o / (2 - o) for gamma = -1/3."""
        return tuple(o * self._shrink(o) for o in self.origin)

    def _shrink(self, origin: float) -> float:
        return 1 / (math.sqrt(1 - 1 / self.gamma) * (1 - origin) + origin)

    def jump(self, stage: int) -> tuple[float, float]:
        """(alpha, beta): the state entering `stage` is alpha * doubled + beta * block noise, white again."""
        alpha = self._shrink(self.origin[stage])
        return alpha, alpha * (1 - self.origin[stage]) / math.sqrt(-self.gamma)

    @cached_property
    def _ranges(self) -> tuple[tuple[float, float], ...]:
        steps, spans = self.num_train_timesteps, [e - s for s, e in zip(self.start, self.end, strict=True)]
        edges = [int(steps * sum(spans[:k]) / sum(spans)) for k in range(self.num_stages)]
        ranges = []
        for k, first in enumerate(edges):
            if k == self.num_stages - 1:
                ranges.append((float(first), steps - 1.0))
            else:  # as many values as there are timesteps, up to, but without, the first of the next stage
                ranges.append((float(first), edges[k + 1] - (edges[k + 1] - first) / steps))
        return tuple(ranges)

    @cached_property
    def first_timestep(self) -> tuple[float, ...]:
        return tuple(first for first, _ in self._ranges)

    @cached_property
    def last_timestep(self) -> tuple[float, ...]:
        """The timestep at `last_t`, the last one that is trained."""
        return tuple(last for _, last in self._ranges)

    def train_timesteps(self, stage: int) -> Tensor:
        """The timesteps from which training draws in a stage: (num_train_timesteps,) float64."""
        return torch.linspace(*self._ranges[stage], self.num_train_timesteps, dtype=torch.float64)

    def timestep(self, stage: int, t: float) -> float:
        first, last = self._ranges[stage]
        return first + (last - first) * t / self.last_t

    def times(self, stage: int, steps: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """Euler steps of one stage: (timesteps (steps,), t (steps + 1,) with a final 1), both float64.

        The grid ends at 0.999, so with shift 1 the last step is only 0.001 wide: released behaviour.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1 in every stage.")
        if shift <= 0:
            raise ValueError(f"shift={shift} must be positive.")
        t = torch.linspace(0, self.last_t, steps, dtype=torch.float64)
        t = t / (shift + (1 - shift) * t)
        first, last = self._ranges[stage]
        return first + (last - first) * t / self.last_t, F.pad(t, (0, 1), value=1.0)

    def sigma(self, timestep: float) -> float:
        return 1 - timestep / self.num_train_timesteps

    def locate(self, sigma: float) -> tuple[int, float, float]:
        """The (stage, t, timestep) that a sigma names. One within rounding (1e-6) of a stage's start is it."""
        timestep = (1 - float(sigma)) * self.num_train_timesteps
        stage = max(k for k in range(self.num_stages) if k == 0 or timestep > self.first_timestep[k] - 1e-3)
        first, last = self._ranges[stage]
        if abs(timestep - first) < 1e-3:
            timestep = first
        return stage, (timestep - first) / (last - first) * self.last_t, timestep

    def denoised(self, x: Tensor, velocity: Tensor, stage: int, t: float) -> Tensor:
        """Estimate of the clean sample at the stage's resolution; exact when halving and doubling it loses nothing."""
        return x + velocity * self._reach(stage, t)

    def velocity(self, x: Tensor, denoised: Tensor, stage: int, t: float) -> Tensor:
        """The inverse of `denoised`."""
        return (denoised - x) / self._reach(stage, t)

    def _reach(self, stage: int, t: float) -> float:
        # The state is tau * sample + (1 - tau) * noise with tau going from s to e at the speed e - s.
        s, e = self.start[stage], self.end[stage]
        return (1 - s - (e - s) * t) / (e - s)


def stage_size(height: int, width: int, stage: int, num_stages: int) -> tuple[int, int]:
    """Size of a stage, in the units of the full size."""
    factor = 2 ** (num_stages - 1 - stage)
    if height % factor or width % factor:
        raise ValueError(f"{width}x{height} cannot be halved {num_stages - 1 - stage} times.")
    return height // factor, width // factor
