"""RMS norm of every head (arXiv 1910.07467), then the rotation of rope.py: what FLUX does to queries and keys.

    y = rotate(x / sqrt(mean(x^2) + eps) * scale, table)

x: (..., D); scale: (D,); table: float32, broadcastable to (..., D/2, 2, 2); y: of the shape and dtype of x. Behind it
comfy-kitchen's `rms_rope1`.
"""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .rope import rotate
from .runtime import kitchen

EPS = 1e-6


def normed_rotate_reference(x: Tensor, scale: Tensor, table: Tensor, eps: float = EPS) -> Tensor:
    return rotate(F.rms_norm(x, x.shape[-1:], scale, eps), table)


def normed_rotate(x: Tensor, scale: Tensor, table: Tensor, eps: float = EPS) -> Tensor:
    fused = kitchen("rms_rope1", x, scale, table) if x.ndim == table.ndim - 2 and x.dtype == scale.dtype else None
    if fused is None:
        return normed_rotate_reference(x, scale, table, eps)
    return fused(x, table, scale, eps)
