"""A batch as a step asks the network about it."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NoisedBatch:
    """What a training step asks the network about its pictures."""

    latent: Tensor
    """(B, C, h, w) at the scale that the network reads."""
    noise: Tensor
    noisy: Tensor
    time: Tensor
    """(B,), of the family's `Diffusion`: PixArt's whole timesteps, on the CPU, where its schedule computes; FLUX's
    sigmas in (0, 1)."""
    condition: dict[str, Tensor]
    """What the network is conditioned on: context (B, L, D), and what its family has beside."""
    cells: Tensor | None = None
    """What the error of each cell counts, (B, 1, h, w), of a mask."""

    def rows(self, index: list[int]) -> NoisedBatch:
        """Some pictures of the batch."""
        return NoisedBatch(*(t[index] for t in (self.latent, self.noise, self.noisy, self.time)),
                           {name: value[index] for name, value in self.condition.items()},
                           None if self.cells is None else self.cells[index])
