"""Means of the loss over held-out pictures, by the noise level too: the whole hides what happens where there is little
noise."""
from __future__ import annotations

from torch import Tensor

WIDTH = 1.96  # standard errors to each side that hold 95 % of a normal distribution


def certainty(loss: Tensor) -> dict[str, float]:
    """The standard error of a mean over pictures, which one picture has none of. loss (B,)."""
    return {"standard_error": (loss.double().std() / len(loss) ** 0.5).item()} if len(loss) > 1 else {}


def in_words(found: dict[str, float], pictures: int) -> str:
    """A validation's loss, with the interval that its mean over other pictures of the kind would mostly lie in."""
    error = found.get("standard_error")
    margin = "" if error is None else f" ± {WIDTH * error:.4f} (95 %)"
    return f"validation loss {found['loss']:.4f}{margin}, {pictures:,} held-out picture{'s' * (pictures != 1)}"


def quarters(loss: Tensor, level: Tensor) -> dict[str, float]:
    """The mean loss of each quarter of the noise levels that has pictures; quarter0 has the least noise. loss (B,);
    level (B,) in [0, 1)."""
    quarter = (4 * level).long()
    return {f"quarter{q}": loss[quarter == q].mean().item() for q in range(4) if (quarter == q).any()}
