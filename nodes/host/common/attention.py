"""ComfyUI's attention in the form that our networks take."""
from __future__ import annotations

from comfy.ldm.modules.attention import optimized_attention


def host_attention(transformer_options: dict):
    """attention(q, k, v, mask=None) over (B, H, N, D) by the implementation set in ComfyUI, overrides included.

    The mask is added to the scores: not all of ComfyUI's functions read a bool one as "keep".
    """

    def attend(q, k, v, mask=None):
        return optimized_attention(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True,
            transformer_options=transformer_options,
        )

    return attend
