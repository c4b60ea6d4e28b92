"""Stage B: diffusion in the latent of Stage A, conditioned on the semantic latent of Stage C.

(arXiv 2306.00637; modules/stage_b.py of Stability-AI/StableCascade@7a7d341f, MIT.)
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ...kernels.attention import attention as dense_attention
from .blocks import Norm2d, UNet, Walk, norm, resize
from .config import StageBConfig

PIXELS = 8  # cells along a side of the zeros used when `pixels` is not given


class StageB(UNet):
    def __init__(self, config: StageBConfig, operations=nn, dtype=None, device=None):
        to = dict(dtype=dtype, device=device)
        super().__init__(config, operations, to)
        D = config.hidden[0]
        self.dtype = dtype

        def mapper(channels: int) -> nn.Sequential:
            return nn.Sequential(
                operations.Conv2d(channels, 4 * D, kernel_size=1, **to), nn.GELU(),
                operations.Conv2d(4 * D, D, kernel_size=1, **to), Norm2d(),
            )

        self.effnet_mapper = mapper(config.semantic_channels)
        self.pixels_mapper = mapper(config.pixel_channels)
        self.clip_mapper = operations.Linear(config.pooled_dim, config.context_dim * config.pooled_tokens, **to)

    def scaler(self, direction: str, upper: int, operations, to: dict) -> nn.Module:
        above, below = self.config.hidden[upper], self.config.hidden[upper + 1]
        if direction == "down":
            return operations.Conv2d(above, below, kernel_size=2, stride=2, **to)  # drops the last of an odd side
        return operations.ConvTranspose2d(below, above, kernel_size=2, stride=2, **to)

    def initialise(self) -> StageB:
        super().initialise()
        for layer in (self.clip_mapper, *(m[i] for m in (self.effnet_mapper, self.pixels_mapper) for i in (0, 2))):
            nn.init.normal_(layer.weight, std=0.02)
        return self

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        semantic: Tensor,
        pooled: Tensor,
        pixels: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        attention: Callable = dense_attention,
    ) -> Tensor:
        """The noise in a latent of Stage A.

        x: (B, in_channels, H, W), sides multiples of patch_size; timestep: (B,) in [0, 1]; semantic: (B,
        semantic_channels, h, w), what Stage C made (zeros: unconditional); pooled: (B, 1, pooled_dim) or
        (B, pooled_dim); pixels: (B, pixel_channels, h, w), by default zeros, which still have an effect: the mapper
        has biases. Returns (B, out_channels, H, W).
        """
        p = self.config.patch_size
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(f"A latent of {x.shape[-1]}x{x.shape[-2]} cells cannot be cut into patches of {p}x{p}: "
                             f"both sides must be multiples of {p}, those of the picture of {4 * p} pixels.")
        if pixels is None:
            pixels = x.new_zeros(x.shape[0], self.config.pixel_channels, PIXELS, PIXELS)
        h = self.embedding(x)
        h = h + self.effnet_mapper(resize(semantic, h).to(x.dtype))
        h = h + resize(self.pixels_mapper(pixels), h)
        context = norm(self.pooled_tokens(self.clip_mapper, pooled))
        return self.run_levels(h, Walk(self.embeddings(timestep, conditions, x.dtype), context, attention))
