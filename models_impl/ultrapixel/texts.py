"""Texts of a small Stable Cascade: the tokens of a T5, padded to its full length as CLIP-G's are, all of them kept."""
from __future__ import annotations

from torch import Tensor


def pooled(tokens: Tensor) -> Tensor:
    """The vector of a whole text, which a T5 has none of as CLIP-G has: the mean of its tokens, padding included.
    (B, L, D) -> (B, D)."""
    return tokens.mean(1)
