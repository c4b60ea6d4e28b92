"""Attention as a plain function. Networks take it as an argument, so a host can give its own.

    y = softmax(q k^T / sqrt(D)) v

Implemented by torch's scaled_dot_product_attention.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .runtime import computed_in

SHORT = 256 * 256  # scores per head


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """y: (B, H, N, D).

    q: (B, H, N, D); k, v: (B, H, L, D); mask: broadcastable to (B, H, N, L), bool with True = keep, or of q's dtype and
    added to the scores, which costs less where many calls share one.
    """
    on_cpu = q.device.type == "cpu" and q.requires_grad
    if on_cpu and q.shape[-2] * k.shape[-2] <= SHORT and computed_in(q) != torch.float32:
        # In 16 bits the backward pass of the fused kernel takes two to three times as long for short sequences (2 x 16
        # heads of 256 tokens and 72 channels in bfloat16: 35 ms against 15). In float32 it is the faster one (29 ms
        # against 33), and keeps no scores.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
