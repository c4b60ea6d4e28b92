"""Stage C: the text-conditional diffusion over the semantic latent of Stable Cascade, with room for UltraPixel's guide.

(arXiv 2306.00637; modules/stage_c.py of Stability-AI/StableCascade@7a7d341f, MIT.) Inside ComfyUI the core
has this network itself; this one is for training and for tests.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...kernels.attention import attention as dense_attention
from .blocks import UNet, Walk, norm
from .config import StageCConfig
from .guidance import Features, FeatureTap


class Resample(nn.Module):
    """The change of width, and where `enabled` of size, between two levels."""

    def __init__(self, source: int, target: int, direction: str, enabled: bool, operations, to: dict):
        super().__init__()
        mapping = operations.Conv2d(source, target, kernel_size=1, **to)
        scale = nn.Identity() if not enabled else nn.Upsample(
            scale_factor=2 if direction == "up" else 0.5, mode="bilinear", align_corners=True
        )
        self.blocks = nn.Sequential(*((scale, mapping) if direction == "up" else (mapping, scale)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class StageC(UNet):
    def __init__(self, config: StageCConfig, operations=nn, dtype=None, device=None):
        to = dict(dtype=dtype, device=device)
        super().__init__(config, operations, to)
        tokens = config.context_dim * config.pooled_tokens
        self.dtype = dtype
        self.clip_txt_mapper = operations.Linear(config.text_dim, config.context_dim, **to)
        self.clip_txt_pooled_mapper = operations.Linear(config.pooled_dim, tokens, **to)
        self.clip_img_mapper = operations.Linear(config.image_dim, tokens, **to)

    def scaler(self, direction: str, upper: int, operations, to: dict) -> nn.Module:
        sizes = self.config.hidden[upper], self.config.hidden[upper + 1]
        source, target = sizes if direction == "down" else sizes[::-1]
        return Resample(source, target, direction, self.config.switch[upper], operations, to)

    def initialise(self) -> StageC:
        super().initialise()
        for mapper in (self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper):
            nn.init.normal_(mapper.weight, std=0.02)
        return self

    def encode_text(self, text: Tensor, pooled: Tensor, image: Tensor | None = None) -> Tensor:
        """The context of the attentions: (B, L + 2*pooled_tokens, context_dim).

        text: (B, L, text_dim), the last hidden states of CLIP-G before its final norm, padding included; pooled:
        (B, 1, pooled_dim) or (B, pooled_dim); image: the same of a CLIP-L image embedding, zeros when not given.
        """
        if text.shape[-1] != self.config.text_dim:
            raise ValueError(f"The text tokens are {text.shape[-1]} wide, this Stage C was trained with "
                             f"{self.config.text_dim}: use the text encoder CLIP-G (bigG).")
        if image is None:
            image = pooled.new_zeros(pooled.shape[0], 1, self.config.image_dim)
        return norm(torch.cat((
            self.clip_txt_mapper(text),
            self.pooled_tokens(self.clip_txt_pooled_mapper, pooled),
            self.pooled_tokens(self.clip_img_mapper, image),
        ), dim=1))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        image: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        control: Sequence[Tensor | None] = (),
        hook: Callable[[str, int, Tensor], Tensor] | None = None,
        attention: Callable = dense_attention,
    ) -> Tensor:
        """The noise in a latent.

        x: (B, in_channels, H, W); timestep: (B,) in [0, 1], as `sampling` has it; text, pooled, image: see
        `encode_text`; conditions: name -> (B,) for the names in the configuration; control: one residual
        (B, hidden, h, w), of any size, or None for each ResBlock in order; hook: see `blocks.Walk`, for the guide.
        Returns (B, out_channels, H, W).
        """
        p = self.config.patch_size
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(f"A latent of {x.shape[-1]}x{x.shape[-2]} cells cannot be cut into patches of {p}x{p}.")
        walk = Walk(self.embeddings(timestep, conditions, x.dtype), self.encode_text(text, pooled, image), attention,
                    iter(control), hook)
        return self.run_levels(self.embedding(x), walk)

    def features(self, *args, **kwargs) -> tuple[Tensor, Features]:
        """`forward` of the low-resolution pass: the noise, and the features that the guide is made of."""
        tap = FeatureTap()
        return self(*args, **kwargs, hook=tap), tap.features
