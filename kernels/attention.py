"""Attention as a plain function. Networks take it as an argument, so a host can give its own.

    y = softmax(q k^T / sqrt(D)) v

Implemented by torch's scaled_dot_product_attention.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 256 * 256  # scores per head


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """y: (B, H, N, D).

    q: (B, H, N, D); k, v: (B, H, L, D); mask: broadcastable to (B, H, N, L), bool with True = keep, or of q's dtype and
    added to the scores, which costs less where many calls share one.
    """
    if q.requires_grad and q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= SHORT:
        # On a CPU the backward pass of the fused kernel costs more than two plain products for short sequences, most of
        # all in bfloat16: so a training step of the emoji recipe takes 0.85 of the time.
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
