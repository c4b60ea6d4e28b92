"""The semantic encoder of Stable Cascade: EfficientNetV2-S (arXiv 2104.00298) and a 1x1 convolution to 16 channels.

Key names and numbers are torchvision's `efficientnet_v2_s().features`.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BN_EPS = 1e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OUT_CHANNELS = 1280
LATENT_CHANNELS = 16
STAGES = (  # fused, expansion, stride, source, target, blocks (table 4 of the paper)
    (True, 1, 1, 24, 24, 2),
    (True, 4, 2, 24, 48, 4),
    (True, 4, 2, 48, 64, 4),
    (False, 4, 2, 64, 128, 6),
    (False, 6, 1, 128, 160, 9),
    (False, 6, 2, 160, 256, 15),
)


def _conv(source, target, kernel, stride, operations, to, groups=1, act=True, padding=None) -> nn.Sequential:
    padding = kernel // 2 if padding is None else padding
    parts = [
        operations.Conv2d(source, target, kernel, stride=stride, padding=padding, groups=groups, bias=False, **to),
        nn.BatchNorm2d(target, eps=BN_EPS, **to),
    ]
    return nn.Sequential(*parts, *([nn.SiLU()] if act else []))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int, operations, to: dict):
        super().__init__()
        self.fc1 = operations.Conv2d(channels, squeezed, 1, **to)
        self.fc2 = operations.Conv2d(squeezed, channels, 1, **to)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(dim=(2, 3), keepdim=True)
        return x * self.fc2(nn.functional.silu(self.fc1(scale))).sigmoid()


class MBConv(nn.Module):
    def __init__(self, fused: bool, expansion: int, stride: int, source: int, target: int, operations, to: dict):
        super().__init__()
        wide, common = source * expansion, (operations, to)
        if fused and expansion == 1:
            parts = [_conv(source, target, 3, stride, *common)]
        elif fused:
            parts = [_conv(source, wide, 3, stride, *common), _conv(wide, target, 1, 1, *common, act=False)]
        else:
            parts = [
                _conv(source, wide, 1, 1, *common), _conv(wide, wide, 3, stride, *common, groups=wide),
                SqueezeExcitation(wide, max(1, source // 4), *common), _conv(wide, target, 1, 1, *common, act=False),
            ]
        self.block = nn.Sequential(*parts)
        self.residual = stride == 1 and source == target

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


@dataclass(frozen=True)
class EffnetConfig:
    latent_channels: int = LATENT_CHANNELS
    blocks: tuple[int, ...] = tuple(stage[-1] for stage in STAGES)
    """Numbers of blocks, a number for each stage; the release has those of EfficientNetV2-S."""

    def __post_init__(self):
        if len(self.blocks) != len(STAGES) or min(self.blocks) < 1 or self.latent_channels < 1:
            raise ValueError(f"blocks={self.blocks} must be {len(STAGES)} numbers from 1, and "
                             f"latent_channels={self.latent_channels} at least 1.")


def features(operations, to: dict, in_channels: int = 3, numbers: Sequence[int] | None = None) -> nn.Sequential:
    """(B, in_channels, H, W) -> (B, 1280, H/32, W/32). numbers: of each stage's blocks, by default the paper's.

    With other than 3 channels the first convolution has no padding: so the released ControlNets were trained.
    """
    parts = [_conv(in_channels, STAGES[0][3], 3, 2, operations, to, padding=1 if in_channels == 3 else 0)]
    for (fused, expansion, stride, source, target, own), number in zip(STAGES, numbers or [None] * len(STAGES),
                                                                      strict=True):
        parts.append(nn.Sequential(*(
            MBConv(fused, expansion, 1 if i else stride, target if i else source, target, operations, to)
            for i in range(number or own)
        )))
    return nn.Sequential(*parts, _conv(STAGES[-1][4], OUT_CHANNELS, 1, 1, operations, to))


class EffnetEncoder(nn.Module):
    """Pictures to the latent of Stage C, as training sees it: 32 pixels to a cell. Meant for evaluation mode."""

    def __init__(self, config: EffnetConfig = EffnetConfig(), operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        self.backbone, channels = features(operations, to, numbers=config.blocks), config.latent_channels
        self.mapper = nn.Sequential(operations.Conv2d(OUT_CHANNELS, channels, 1, bias=False, **to),
                                    nn.BatchNorm2d(channels, affine=False, **to))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, latent_channels, H/32, W/32)."""
        # filled on the device: torch.tensor would be an upload, which waits for a GPU
        mean, std = (torch.stack([image.new_full((1, 1), v) for v in values]) for values in (MEAN, STD))
        return self.mapper(self.backbone((image - mean) / std))
