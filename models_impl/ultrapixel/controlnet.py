"""The ControlNet of Stage C: a convolutional backbone over the hint and one projection for each controlled ResBlock.

(modules/controlnet.py of Stability-AI/StableCascade@7a7d341f, MIT.) UltraPixel uses it in the low-resolution pass.
"""
from __future__ import annotations

from torch import Tensor, nn

from .blocks import channels_first, channels_last
from .config import ControlNetConfig
from .effnet import OUT_CHANNELS, features

SLOPE = 0.2
LARGE = (16384, 1024, 8)  # wide, narrow, blocks


class Residual(nn.Module):
    def __init__(self, channels: int, operations, to: dict):
        super().__init__()
        self.blocks = nn.ModuleList(part for _ in range(2) for part in (
            operations.LayerNorm(channels, **to), nn.GELU(),
            operations.Conv2d(channels, channels, kernel_size=3, padding=1, **to),
        ))

    def forward(self, x: Tensor) -> Tensor:
        norm1, act, conv1, norm2, _, conv2 = self.blocks
        h = conv1(channels_first(act(norm1(channels_last(x)))))
        return x + conv2(channels_first(act(norm2(channels_last(h)))))


class ControlNet(nn.Module):
    def __init__(self, config: ControlNetConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to, C = dict(dtype=dtype, device=device), config.in_channels
        self.config, self.dtype = config, dtype
        if config.backbone == "effnet":
            self.backbone, channels = features(operations, to, C), OUT_CHANNELS
        elif config.backbone == "large":
            wide, narrow, blocks = LARGE
            self.backbone, channels = nn.Sequential(
                operations.Conv2d(C, wide, kernel_size=1, **to), nn.LeakyReLU(SLOPE),
                operations.Conv2d(wide, narrow, kernel_size=1, **to),
                *(Residual(narrow, operations, to) for _ in range(blocks)),
                operations.Conv2d(narrow, OUT_CHANNELS, kernel_size=1, **to),
            ), OUT_CHANNELS
        else:
            self.backbone, channels = nn.Sequential(
                operations.Conv2d(C, 4 * C, kernel_size=3, padding=1, **to), nn.LeakyReLU(SLOPE),
                operations.Conv2d(4 * C, C, kernel_size=3, padding=1, **to),
            ), C
        self.projections = nn.ModuleList(
            nn.Sequential(
                operations.Conv2d(channels, channels, kernel_size=1, bias=False, **to), nn.LeakyReLU(SLOPE),
                operations.Conv2d(channels, config.hidden, kernel_size=1, bias=False, **to),
            )
            for _ in config.blocks
        )

    def forward(self, hint: Tensor) -> list[Tensor | None]:
        """(B, in_channels, H, W) -> residuals (B, hidden, h, w), one or None for each ResBlock of Stage C in order.

        They do not depend on the timestep: once per image is enough. Their size need not be that of the latent.
        """
        x = self.backbone(hint)
        residuals: list[Tensor | None] = [None] * (max(self.config.blocks) + 1)
        for block, projection in zip(self.config.blocks, self.projections, strict=True):
            residuals[block] = projection(x)
        return residuals
