"""Means of the loss over held-out pictures, by the noise level too: the whole hides what happens where there is little
noise."""
from __future__ import annotations

from torch import Tensor


def quarters(loss: Tensor, level: Tensor) -> dict[str, float]:
    """The mean loss of each quarter of the noise levels that has pictures; quarter0 has the least noise. loss (B,);
    level (B,) in [0, 1)."""
    quarter = (4 * level).long()
    return {f"quarter{q}": loss[quarter == q].mean().item() for q in range(4) if (quarter == q).any()}
