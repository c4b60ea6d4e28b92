"""Stage A: the small autoencoder between the latent of Stage B and pixels.

(arXiv 2306.00637; modules/stage_a.py of Stability-AI/StableCascade@7a7d341f, MIT; its vector quantisation
plays no part in sampling and is not kept.)

The decoder has no norm and no attention that spans the picture, so it can be cut exactly in two ways. Strips: a block
runs on a few rows after the other and writes over its input, which bounds all that it takes beside to a strip and
changes neither the work nor a bit of the result. Tiles: a decoded cell depends on `StageAConfig.halo` cells on each
side, so a tile that brings as many along, clipped and not padded at the border of the picture, is exact inside.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import channels_first, channels_last, norm
from .config import StageAConfig

STRIP = 16384  # positions of a strip: 50 MB of float32 in the widest tensor of the released decoder


class StageABlock(nn.Module):
    def __init__(self, channels: int, operations, to: dict):
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), operations.Conv2d(channels, channels, kernel_size=3, groups=channels, **to)
        )
        self.channelwise = nn.Sequential(
            operations.Linear(channels, 4 * channels, **to), nn.GELU(), operations.Linear(4 * channels, channels, **to)
        )
        self.gammas = nn.Parameter(torch.zeros(6, **to))

    def forward(self, x: Tensor) -> Tensor:
        # x: (B, D, H, W)
        return self._mlp(x + self._spatial(self._first_norm(x), self.depthwise))

    def in_strips(self, x: Tensor, rows: int) -> Tensor:
        """`forward` of `rows` at a time, written over x."""
        pad, conv = self.depthwise
        above = None  # the last row of the strip before, as it was
        for top in range(0, x.shape[2], rows):
            bottom = min(top + rows, x.shape[2])
            h = x[:, :, top : bottom + 1]
            if above is not None:
                h = torch.cat((above, h), dim=2)
            above = x[:, :, bottom - 1 : bottom].clone()
            edge = (1, 1, int(top == 0), int(bottom == x.shape[2]))  # only the picture's border is replicated
            h = F.pad(self._first_norm(h), edge, mode="replicate")
            x[:, :, top:bottom] = self._mlp(x[:, :, top:bottom] + self._spatial(h, conv))
        return x

    def _first_norm(self, x: Tensor) -> Tensor:
        gammas = self.gammas.to(x)
        return channels_first(norm(channels_last(x)) * (1 + gammas[0]) + gammas[1])

    def _spatial(self, h: Tensor, conv: nn.Module) -> Tensor:
        return conv(h) * self.gammas.to(h)[2]

    def _mlp(self, x: Tensor) -> Tensor:
        gammas = self.gammas.to(x)
        h = norm(channels_last(x)) * (1 + gammas[3]) + gammas[4]
        return x + channels_first(self.channelwise(h)) * gammas[5]


def decode_bytes(config: StageAConfig, height: int, width: int, itemsize: int) -> int:
    """Bytes, without weights, of `StageA.decode` in strips for one latent of height x width cells; `encode` likewise.

    Features of two levels exist at once while one is made from the other, then the finest with the picture before and
    after its shuffle. A strip's tensors add up to eleven times its width: its input and output, the normed input,
    and the four times wider layer before and after the GELU.
    """
    cells, levels = height * width, range(config.levels)
    features = [config.hidden * 2**level for level in levels]  # values a cell; a level up is half as wide
    side_by_side = max(sum(features[-2:]), features[-1] + 2 * 3 * config.compression**2)
    widest = max(config.hidden // 2**level * min(STRIP, cells * 4**level) for level in levels)
    return itemsize * (side_by_side * cells + 11 * widest)


def double_in_strips(conv: nn.ConvTranspose2d, x: Tensor, rows: int) -> Tensor:
    """conv(x), of kernel 4, stride 2 and padding 1, for `rows` of x at a time: (B, D, H, W) -> (B, D', 2H, 2W).

    An output row depends on the row of x over it and on one of the neighbours.
    """
    H, double = x.shape[2], None
    for top in range(0, H, rows):
        bottom = min(top + rows, H)
        above, below = int(top > 0), int(bottom < H)
        part = conv(x[:, :, top - above : bottom + below])
        if double is None:
            double = part.new_empty(*part.shape[:2], 2 * H, part.shape[3])
        double[:, :, 2 * top : 2 * bottom] = part[:, :, 2 * above : part.shape[2] - 2 * below]
    return double


class StageA(nn.Module):
    def __init__(self, config: StageAConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        widths, C = config.widths, config.latent_channels
        self.config, self.dtype = config, dtype
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), operations.Conv2d(12, widths[0], kernel_size=1, **to))
        down = []
        for i, width in enumerate(widths):
            if i:
                down.append(operations.Conv2d(widths[i - 1], width, kernel_size=4, stride=2, padding=1, **to))
            down.append(StageABlock(width, operations, to))
        down.append(nn.Sequential(operations.Conv2d(widths[-1], C, kernel_size=1, bias=False, **to),
                                  nn.BatchNorm2d(C, **to)))
        self.down_blocks = nn.Sequential(*down)
        up = [nn.Sequential(operations.Conv2d(C, widths[-1], kernel_size=1, **to))]
        for i, width in enumerate(reversed(widths)):
            up += [StageABlock(width, operations, to) for _ in range(1 if i else config.bottleneck_blocks)]
            if i < len(widths) - 1:
                up.append(operations.ConvTranspose2d(width, width // 2, kernel_size=4, stride=2, padding=1, **to))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(operations.Conv2d(widths[0], 12, kernel_size=1, **to), nn.PixelShuffle(2))

    def encode(self, image: Tensor, strip: int | None = STRIP) -> Tensor:
        """(B, 3, H, W) in [0, 1], sides multiples of `config.compression` -> (B, latent_channels, H/4, W/4).

        strip: see `decode`.
        """
        multiple = self.config.compression
        if image.shape[-2] % multiple or image.shape[-1] % multiple:
            raise ValueError(f"Stage A cannot encode {image.shape[-1]}x{image.shape[-2]} pixels: both sides must be "
                             f"multiples of {multiple}.")
        return self._run(self.down_blocks, self.in_block(image), strip) / self.config.scale_factor

    def decode(self, latent: Tensor, strip: int | None = STRIP, callback: Callable[[int, int], None] | None = None
               ) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, 4h, 4w), nominally in [0, 1] and not clamped.

        strip: positions that a block or a transposed convolution takes at a time, rounded to whole rows; None takes all
        of them, and so does a pass with gradients. Either way the result is the same. At 256x256 cells the released
        decoder took 33.0 KiB a cell without strips and 8.0 KiB with them (torch's allocator, float32 on a CPU); the
        more cells, the nearer to the 4.5 KiB of two features side by side.
        callback(layers done, layers in all).
        """
        return self.out_block(self._run(self.up_blocks, latent * self.config.scale_factor, strip, callback))

    def _run(self, parts: nn.Sequential, x: Tensor, strip: int | None, callback=None) -> Tensor:
        cut = strip is not None and not torch.is_grad_enabled()
        for done, part in enumerate(parts, 1):
            rows = max(1, strip // (x.shape[0] * x.shape[3])) if cut else x.shape[2]
            if cut and isinstance(part, StageABlock):
                x = part.in_strips(x, rows)
            elif rows < x.shape[2] and isinstance(part, nn.ConvTranspose2d):
                x = double_in_strips(part, x, rows)
            else:
                x = part(x)
            if callback is not None:
                callback(done, len(parts))
        return x

    def decode_tiled(
        self, latent: Tensor, tile: int = 256, callback: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """`decode` by tiles of `tile` cells a side, each with its halo; exact but for the rounding of the kernels.

        callback(tiles done, tiles in all).
        """
        if tile < 1:
            raise ValueError(f"tile={tile} must be at least 1.")
        (B, _, H, W), halo, scale = latent.shape, self.config.halo, self.config.compression
        corners = [(top, left) for top in range(0, H, tile) for left in range(0, W, tile)]
        image = None
        for done, (top, left) in enumerate(corners, 1):
            y, x = max(top - halo, 0), max(left - halo, 0)
            piece = self.decode(latent[:, :, y : top + tile + halo, x : left + tile + halo])
            if image is None:
                image = piece.new_empty(B, 3, H * scale, W * scale)
            y, x, height, width = ((top - y) * scale, (left - x) * scale, min(tile, H - top) * scale,
                                   min(tile, W - left) * scale)
            image[:, :, top * scale : top * scale + height, left * scale : left * scale + width] = (
                piece[:, :, y : y + height, x : x + width]
            )
            if callback is not None:
                callback(done, len(corners))
        return image
