"""Noise levels that training draws: a distribution in [0, 1], shifted, cut off and weighted by quarters."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("uniform", "logit_normal")


@dataclass(frozen=True)
class TimestepDraws:
    """A distribution of noise levels, 0 without noise and 1 with nothing else. Every draw is one uniform number through
    the inverse of the cumulative distribution, in float64 on the CPU."""

    kind: str = "uniform"
    """logit_normal: the sigmoid of a normal number (SD3, arXiv 2403.03206, section 3.1)."""
    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0
    """t becomes shift t / (1 + (shift - 1) t) (SD3, section 5.3.2; for levels that are no flow's as OneTrainer has
    it, ModelSetupNoiseMixin)."""
    low: float = 0.0
    high: float = 1.0
    quarters: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """What the density is multiplied with in each quarter of [0, 1], before it is brought to 1 again."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"The distribution of noise levels {self.kind!r} is not one of {', '.join(KINDS)}.")
        if self.deviation <= 0 or self.shift <= 0:
            raise ValueError(f"deviation={self.deviation} and shift={self.shift} must be more than 0.")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"Noise levels from {self.low} to {self.high} are no range inside [0, 1].")

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """(B,) float64."""
        return self.quantile(torch.rand(batch, generator=rng, dtype=torch.float64))

    def quantile(self, share: Tensor) -> Tensor:
        """The level below which this share of the draws lies; share: (B,) float64 in [0, 1)."""
        edges = torch.tensor([min(max(q / 4, self.low), self.high) for q in range(5)], dtype=torch.float64)
        below = self.cumulative(edges)
        mass = below.diff() * torch.tensor(self.quarters, dtype=torch.float64)
        if not mass.sum() > 0:
            raise ValueError(f"The quarters {self.quarters} leave nothing to draw from {self.low} to {self.high}.")
        upto = mass.cumsum(0)
        quarter = torch.searchsorted(upto, share * upto[-1], right=True).clamp(max=mass.nonzero().max().item())
        inside = ((share * upto[-1] - (upto - mass)[quarter]) / mass[quarter]).clamp(0, 1)
        found = self.inverse(torch.lerp(below[quarter], below[quarter + 1], inside))
        return found.clamp(edges[quarter], edges[quarter + 1])  # rounding would leave the quarter

    def cumulative(self, level: Tensor) -> Tensor:
        """Share of the distribution below a level, before it is cut off and weighted."""
        plain = level / (self.shift - (self.shift - 1) * level)
        if self.kind == "uniform":
            return plain
        return torch.special.ndtr((plain.logit() - self.mean) / self.deviation)

    def inverse(self, share: Tensor) -> Tensor:
        plain = share
        if self.kind == "logit_normal":
            plain = (self.mean + self.deviation * torch.special.ndtri(share)).sigmoid()
        return self.shift * plain / (1 + (self.shift - 1) * plain)
