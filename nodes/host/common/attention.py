"""ComfyUI's attention in the form that our networks take."""
from __future__ import annotations

import torch
from comfy.ldm.modules.attention import optimized_attention


def host_attention(transformer_options: dict):
    """attention(q, k, v, mask=None) over (B, H, N, D) by the implementation set in ComfyUI, overrides included."""

    def attend(q, k, v, mask=None):
        if mask is not None:  # not all of ComfyUI's attention functions read a bool mask as "keep"
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.finfo(q.dtype).max)
        return optimized_attention(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True,
            transformer_options=transformer_options,
        )

    return attend
