"""LayerNorm without weights, then a shift and scale per sample (adaLN of DiT, arXiv 2212.09748, section 3.2).

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

x: (..., D); shift, scale: broadcastable to x; y: of the shape of x. Behind it comfy-kitchen's `adaln`.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .runtime import kitchen

EPS = 1e-6


def modulated_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    fused = kitchen("adaln", x, shift, scale) if x.dtype == shift.dtype == scale.dtype else None
    if fused is None:
        return modulated_norm_reference(x, shift, scale, eps)
    return fused(x, scale, shift, eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, for an x that another norm has already normalised."""
    return torch.addcmul(shift, x, 1 + scale)
