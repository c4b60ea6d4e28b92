"""The blocks that Stage C and Stage B are made of, and the U-net that runs them.

Stable Cascade (arXiv 2306.00637; modules/common.py, stage_c.py and stage_b.py of Stability-AI/StableCascade@7a7d341f,
MIT). Features are (B, D, H, W); linear layers and norms work on the last dimension of (B, H, W, D).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.modulated_norm import modulate
from .. import checkpointing
from ..layers import sinusoid, split_heads
from .config import CascadeConfig

EPS = 1e-6
POSITIONS = 10000.0  # a timestep of 1, in the units of the sinusoids


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear to the height and width of `like`, corners on corners."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x.float(), size=like.shape[-2:], mode="bilinear", align_corners=True).to(x.dtype)


def timestep_embedding(value: Tensor, channels: int) -> Tensor:
    """(B,) in [0, 1] -> (B, channels) float32."""
    return sinusoid(value.float() * POSITIONS, channels, exact_end=True, sin_first=True)


class Norm2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return channels_first(norm(channels_last(x)))


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2 (arXiv 2301.00808). (B, H, W, D); its statistics span the whole picture."""

    def __init__(self, channels: int, to: dict):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels, **to))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels, **to))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        share = (size / (size.mean(dim=-1, keepdim=True) + EPS)).to(x.dtype)  # (B, 1, 1, D)
        return modulate(x, self.beta.to(x), self.gamma.to(x) * share)


def channelwise(source: int, channels: int, dropout: float, operations, to: dict) -> nn.Sequential:
    return nn.Sequential(
        operations.Linear(source, 4 * channels, **to),
        nn.GELU(),
        GlobalResponseNorm(4 * channels, to),
        nn.Dropout(dropout),
        operations.Linear(4 * channels, channels, **to),
    )


class ResBlock(nn.Module):
    """Depthwise convolution, norm and MLP; a skip is concatenated to the normed features."""

    def __init__(self, channels: int, skip: int, kernel_size: int, dropout: float, operations, to: dict):
        super().__init__()
        self.depthwise = operations.Conv2d(
            channels, channels, kernel_size=kernel_size, padding=kernel_size // 2, groups=channels, **to
        )
        self.channelwise = channelwise(channels + skip, channels, dropout, operations, to)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = norm(channels_last(self.depthwise(x)))
        if skip is not None:
            h = torch.cat((h, channels_last(skip)), dim=-1)
        return x + channels_first(self.channelwise(h))


class FeedForwardBlock(nn.Module):
    def __init__(self, channels: int, dropout: float, operations, to: dict):
        super().__init__()
        self.channelwise = channelwise(channels, channels, dropout, operations, to)

    def forward(self, x: Tensor) -> Tensor:
        return x + channels_first(self.channelwise(norm(channels_last(x))))


class TimestepBlock(nn.Module):
    """x * (1 + a) + b, where (a, b) is a sum over the timestep and the further conditions."""

    def __init__(self, channels: int, timestep_dim: int, conditions: Iterable[str], operations, to: dict):
        super().__init__()
        self.conditions = tuple(conditions)
        self.mapper = operations.Linear(timestep_dim, 2 * channels, **to)
        for name in self.conditions:
            setattr(self, f"mapper_{name}", operations.Linear(timestep_dim, 2 * channels, **to))

    def shift_scale(self, embeddings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """embeddings: name -> (B, timestep_dim), the timestep under "". Returns (b, a), each (B, D)."""
        both = self.mapper(embeddings[""])
        for name in self.conditions:
            both = both + getattr(self, f"mapper_{name}")(embeddings[name])
        scale, shift = both.chunk(2, dim=1)
        return shift, scale

    def forward(self, x: Tensor, embeddings: Mapping[str, Tensor]) -> Tensor:
        shift, scale = self.shift_scale(embeddings)
        return modulate(x, shift[:, :, None, None], scale[:, :, None, None])


class CascadeAttention(nn.Module):
    """torch's MultiheadAttention; keys and values are the tokens themselves, if so configured, and the context."""

    def __init__(self, channels: int, heads: int, self_attention: bool, dropout: float, operations, to: dict):
        super().__init__()
        self.heads, self.self_attention, self.dropout = heads, self_attention, dropout
        self.in_proj = operations.Linear(channels, 3 * channels, **to)
        self.out_proj = operations.Linear(channels, channels, **to)

    def forward(self, x: Tensor, context: Tensor, attention: Callable) -> Tensor:
        # x: (B, N, D); context: (B, L, D). One product for both: the context's queries are a few tokens of waste.
        N = x.shape[1]
        qkv = self.in_proj(torch.cat((x, context), dim=1))
        q, k, v = split_heads(qkv, 3, self.heads)  # each (B, heads, N+L, D/heads)
        q = q[:, :, :N]
        if not self.self_attention:
            k, v = k[:, :, N:], v[:, :, N:]
        if self.training and self.dropout:
            h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        else:
            h = attention(q, k, v)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    def __init__(self, channels, context_dim, heads, self_attention, dropout, operations, to: dict):
        super().__init__()
        attention = CascadeAttention(channels, heads, self_attention, dropout, operations, to)
        self.attention = nn.ModuleDict({"attn": attention})
        self.kv_mapper = nn.Sequential(nn.SiLU(), operations.Linear(context_dim, channels, **to))

    def forward(self, x: Tensor, context: Tensor, attention: Callable) -> Tensor:
        tokens = norm(channels_last(x)).flatten(1, 2)  # (B, N, D)
        h = self.attention["attn"](tokens, self.kv_mapper(context), attention)
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


@dataclass
class Walk:
    """The state that one forward pass carries through the levels."""

    embeddings: Mapping[str, Tensor]
    context: Tensor
    attention: Callable
    control: Iterable[Tensor | None] = iter(())
    """Residuals in the order of the ResBlocks."""
    hook: Callable[[str, int, Tensor], Tensor] | None = None
    """hook("down" or "up", level, features) -> features, after the first attention block of every level, the first
    time the level is run. `up` levels count as the net runs, so 0 is the deepest."""


class UNet(nn.Module):
    """The levels of Stage C and B. A subclass gives the scalers between them and what goes in."""

    def __init__(self, config: CascadeConfig, operations, to: dict):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        levels, p, D = len(config.hidden), config.patch_size, config.hidden
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(p), operations.Conv2d(config.in_channels * p * p, D[0], kernel_size=1, **to), Norm2d()
        )

        def block(kind: str, level: int, skip: int = 0) -> nn.Module:
            dropout = config.dropout[level]
            if kind == "C":
                return ResBlock(D[level], skip, config.kernel_size, dropout, operations, to)
            if kind == "T":
                return TimestepBlock(D[level], config.timestep_dim, config.conditions, operations, to)
            if kind == "A":
                return AttentionBlock(
                    D[level], config.context_dim, config.heads[level], config.self_attention[level], dropout,
                    operations, to,
                )
            return FeedForwardBlock(D[level], dropout, operations, to)

        def mappers(level: int, repeats: int) -> nn.ModuleList:
            return nn.ModuleList(operations.Conv2d(D[level], D[level], kernel_size=1, **to) for _ in range(repeats - 1))

        up = range(levels - 1, -1, -1)
        self.down_blocks = nn.ModuleList(
            nn.ModuleList(block(kind, i) for kind in config.down[i]) for i in range(levels)
        )
        self.down_downscalers = nn.ModuleList(
            nn.Sequential(Norm2d(), self.scaler("down", i - 1, operations, to)) if i else nn.Identity()
            for i in range(levels)
        )
        self.down_repeat_mappers = nn.ModuleList(mappers(i, config.down_repeats[i]) for i in range(levels))
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(
                block(kind, i, skip=D[i] if position == 0 and i < levels - 1 else 0)
                for position, kind in enumerate(config.up[j])
            )
            for j, i in enumerate(up)
        )
        self.up_upscalers = nn.ModuleList(
            nn.Sequential(Norm2d(), self.scaler("up", i - 1, operations, to)) if i else nn.Identity() for i in up
        )
        self.up_repeat_mappers = nn.ModuleList(mappers(i, config.up_repeats[j]) for j, i in enumerate(up))
        self.clf = nn.Sequential(
            Norm2d(), operations.Conv2d(D[0], config.out_channels * p * p, kernel_size=1, **to), nn.PixelShuffle(p)
        )

    def scaler(self, direction: str, upper: int, operations, to: dict) -> nn.Module:
        """Between level `upper` and the one below it."""
        raise NotImplementedError

    def initialise(self) -> UNet:
        """The reference's initialisation: Xavier, zeros where the output and the timesteps begin."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embedding[1].weight, 0.02)
        nn.init.zeros_(self.clf[1].weight)
        depth = sum(kinds.count("C") for kinds in self.config.down)
        for block in (b for level in (*self.down_blocks, *self.up_blocks) for b in level):
            if isinstance(block, ResBlock | FeedForwardBlock):
                with torch.no_grad():
                    block.channelwise[-1].weight.mul_(math.sqrt(1 / depth))
            elif isinstance(block, TimestepBlock):
                for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
                    nn.init.zeros_(layer.weight)
        return self

    def embeddings(self, timestep: Tensor, conditions: Mapping[str, Tensor] | None, dtype) -> dict[str, Tensor]:
        values = {"": timestep, **dict.fromkeys(self.config.conditions, torch.zeros_like(timestep)),
                  **(conditions or {})}
        unknown = values.keys() - {"", *self.config.conditions}
        if unknown:
            raise ValueError(f"Conditions {', '.join(sorted(unknown))} are unknown here; there are "
                             f"{', '.join(self.config.conditions) or 'none'}.")
        return {name: timestep_embedding(value, self.config.timestep_dim).to(dtype) for name, value in values.items()}

    def pooled_tokens(self, mapper: nn.Module, vector: Tensor) -> Tensor:
        """(B, C) or (B, K, C) -> (B, K*pooled_tokens, context_dim)."""
        tokens = mapper(vector if vector.ndim == 3 else vector[:, None])
        return tokens.unflatten(-1, (-1, self.config.context_dim)).flatten(1, 2)

    def run_levels(self, x: Tensor, walk: Walk) -> Tensor:
        """x: (B, hidden[0], H, W), embedded -> (B, out_channels, ...)."""
        skips = []
        for i, scale in enumerate(self.down_downscalers):
            x = self._level(scale(x), "down", i, walk)
            skips.append(x)
        for j, scale in enumerate(self.up_upscalers):
            skip = skips.pop()
            x = scale(self._level(x, "up", j, walk, skip if j else None))
        return self.clf(x)

    def _level(self, x: Tensor, direction: str, level: int, walk: Walk, skip: Tensor | None = None) -> Tensor:
        blocks = getattr(self, f"{direction}_blocks")[level]
        mappers = getattr(self, f"{direction}_repeat_mappers")[level]
        hook = walk.hook
        for repeat in range(len(mappers) + 1):
            for position, block in enumerate(blocks):
                if isinstance(block, ResBlock):
                    joined = skip if position == 0 else None  # in every repetition
                    if joined is not None:
                        x = resize(x, joined)
                    residual = next(walk.control, None)
                    if residual is not None:
                        x = x + resize(residual, x).to(x.dtype)
                    x = self._run(block, x, joined)
                elif isinstance(block, TimestepBlock):
                    x = self._run(block, x, walk.embeddings)
                elif isinstance(block, AttentionBlock):
                    x = self._run(block, x, walk.context, walk.attention)
                    if hook is not None:
                        x, hook = hook(direction, level, x), None
                else:
                    x = self._run(block, x)
            if repeat < len(mappers):
                x = mappers[repeat](x)
        return x

    def _run(self, block: nn.Module, *args) -> Tensor:
        return checkpointing.run(block, *args, checkpointed=self.gradient_checkpointing)
