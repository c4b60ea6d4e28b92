"""Rotary position embedding (arXiv 2104.09864): neighbouring pairs of channels turn by an angle each.

    y[2i], y[2i + 1] = table[i] @ (x[2i], x[2i + 1])        table[i] = ((cos, -sin), (sin, cos)) of angle i

x: (..., D); table: float32, broadcastable to (..., D/2, 2, 2); y: of the shape and dtype of x, computed in float32.
Behind it comfy-kitchen's `apply_rope1`, which takes tables in the same form.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .runtime import kitchen


def rope_matrices(angle: Tensor) -> Tensor:
    """Rotations (..., 2, 2) float32 by angles (...) in radians, which are computed in the angles' dtype."""
    return torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1).unflatten(-1, (2, 2)).float()


def rotate_reference(x: Tensor, table: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 1, 2)).unbind(-1)  # each (..., D/2, 1)
    turned = table[..., 0] * a  # float32, for the table is: a GPU casts x as it reads it
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.addcmul(turned, table[..., 1], b).flatten(-2).to(x.dtype)
    # Rounded as it is written, which autograd cannot follow.
    return torch.addcmul(turned, table[..., 1], b, out=torch.empty_like(turned, dtype=x.dtype)).flatten(-2)


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back, by the transposed table: autograd's own would keep both halves of x and add up
    products over pairs."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return rotate_reference(x, table)

    @staticmethod
    def backward(ctx, grad: Tensor):
        table, = ctx.saved_tensors
        return _Rotation.apply(grad, table.transpose(-1, -2)), None


def rotate(x: Tensor, table: Tensor) -> Tensor:
    fused = kitchen("apply_rope1", x, table) if x.ndim == table.ndim - 2 else None
    if fused is not None:
        return fused(x, table)
    if x.requires_grad and torch.is_grad_enabled() and not table.requires_grad and not torch.compiler.is_compiling() \
            and turned_shape(x, table) == x.shape:
        return _Rotation.apply(x, table)
    return rotate_reference(x, table)


def turned_shape(x: Tensor, table: Tensor) -> torch.Size:
    return torch.broadcast_shapes(x.shape[:-1], table.shape[:-3]) + x.shape[-1:]
