"""The FLUX.1 transformer: blocks with separate image and text streams, then blocks on both joined (text first).

Positions are an input, so pictures of any size are sequences of 2x2-cell tokens. Key names are those of the release
(black-forest-labs/flux, src/flux/model.py and modules/layers.py).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attention as dense_attention
from ...kernels.modulated_norm import modulated_norm
from ...kernels.normed_rope import normed_rotate
from ...kernels.rope import rope_matrices, rotate
from .. import checkpointing
from ..layers import sinusoid, split_heads
from .config import FluxConfig

EPS = 1e-6
TIME_CHANNELS = 256  # of `sinusoid`


def pack(x: Tensor) -> Tensor:
    """Latent (B, C, H, W) -> tokens (B, H/2*W/2, C*4), each ordered (channel, row, column)."""
    H, W = x.shape[-2:]
    if H % 2 or W % 2:
        raise ValueError(f"FLUX cannot cut a latent of {H}x{W} cells into tokens of 2x2: both sides must be even "
                         "(pictures a multiple of 16 pixels).")
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height, width in latent cells."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def positions(rows: int, columns: int, device=None) -> Tensor:
    """(index, row, column) of the image tokens of one picture: (rows*columns, 3) float32, index 0."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1).float().to(device)


def rope_table(ids: Tensor, axes: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Rotation matrices: (1 or B, 1, N, D/2, 2, 2) float32 for ids (N, len(axes)) or (B, N, len(axes))."""
    ids = ids if ids.ndim == 3 else ids[None]
    if ids.device.type not in ("cpu", "cuda"):
        ids = ids.cpu()  # float64 as in training, which not every accelerator has
    angles = []
    for axis, channels in enumerate(axes):
        frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=ids.device) / channels)
        angles.append(ids[..., axis, None].double() * frequency)
    return rope_matrices(torch.cat(angles, dim=-1))[:, None]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class MLPEmbedder(nn.Module):
    def __init__(self, channels: int, hidden: int, operations, to: dict):
        super().__init__()
        self.in_layer = operations.Linear(channels, hidden, **to)
        self.out_layer = operations.Linear(hidden, hidden, **to)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, channels: int, to: dict):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, **to))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale.to(x), EPS)

    def rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        return normed_rotate(x, self.scale.to(x), rope, EPS)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int, to: dict):
        super().__init__()
        self.query_norm = RMSNorm(head_dim, to)
        self.key_norm = RMSNorm(head_dim, to)


class FluxModulation(nn.Module):
    """`chunks` tensors (B, 1, D): one or two times (shift, scale, gate)."""

    def __init__(self, hidden: int, chunks: int, operations, to: dict):
        super().__init__()
        self.chunks = chunks
        self.lin = operations.Linear(hidden, chunks * hidden, **to)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.chunks, dim=-1)


class FluxSelfAttention(nn.Module):
    """The weights of one stream; the block joins the streams and attends."""

    def __init__(self, hidden: int, heads: int, qkv_bias: bool, operations, to: dict):
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(hidden, 3 * hidden, bias=qkv_bias, **to)
        self.norm = QKNorm(hidden // heads, to)
        self.proj = operations.Linear(hidden, hidden, **to)

    def split(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v, each (B, heads, N, D/heads), q and k normalised and, by `rope`, turned."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        if rope is None:
            return self.norm.query_norm(q), self.norm.key_norm(k), v
        return self.norm.query_norm.rotated(q, rope), self.norm.key_norm.rotated(k, rope), v


def mlp(hidden: int, mlp_hidden: int, operations, to: dict) -> nn.Sequential:
    return nn.Sequential(
        operations.Linear(hidden, mlp_hidden, **to), nn.GELU(approximate="tanh"),
        operations.Linear(mlp_hidden, hidden, **to),
    )  # fmt: skip


class DoubleStreamBlock(nn.Module):
    def __init__(self, config: FluxConfig, operations, to: dict):
        super().__init__()
        D = config.hidden
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", FluxModulation(D, 6, operations, to))
            self.add_module(f"{stream}_attn", FluxSelfAttention(D, config.heads, config.qkv_bias, operations, to))
            self.add_module(f"{stream}_mlp", mlp(D, config.mlp_hidden, operations, to))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, attention: Callable
    ) -> tuple[Tensor, Tensor]:
        # img: (B, N, D); txt: (B, L, D); vec: (B, D); rope of [txt, img]
        L = txt.shape[1]
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        h = self._attend(modulated_norm(txt, txt_shift1, txt_scale1), modulated_norm(img, img_shift1, img_scale1), rope,
                         attention)
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(h[:, L:]))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulated_norm(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(h[:, :L]))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2)))
        return img, txt

    def _attend(self, txt: Tensor, img: Tensor, rope: Tensor, attention: Callable) -> Tensor:
        """(B, L+N, D). On its own, so that queries, keys and values are gone before the MLPs need memory."""
        streams = zip(self.txt_attn.split(txt), self.img_attn.split(img), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in streams)
        return attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side, their projections fused (arXiv 2302.05442)."""

    def __init__(self, config: FluxConfig, operations, to: dict):
        super().__init__()
        D = config.hidden
        self.heads, self.widths = config.heads, (3 * D, config.mlp_hidden)
        self.linear1 = operations.Linear(D, sum(self.widths), **to)
        self.linear2 = operations.Linear(D + config.mlp_hidden, D, **to)
        self.norm = QKNorm(config.head_dim, to)
        self.modulation = FluxModulation(D, 3, operations, to)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor, attention: Callable) -> Tensor:
        # x: (B, L+N, D)
        shift, scale, gate = self.modulation(vec)
        qkv, h = self.linear1(modulated_norm(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, 3, self.heads)  # each (B, heads, L+N, D/heads)
        q, k = self.norm.query_norm.rotated(q, rope), self.norm.key_norm.rotated(k, rope)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        del qkv, q, k, v  # with h the largest tensor of the block goes, before the next largest is made
        h = F.gelu(h, approximate="tanh")
        return torch.addcmul(x, gate, self.linear2(torch.cat((attended, h), dim=-1)))


class FluxFinalLayer(nn.Module):
    def __init__(self, config: FluxConfig, operations, to: dict):
        super().__init__()
        D = config.hidden
        self.linear = operations.Linear(D, config.in_channels, **to)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(D, 2 * D, **to))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


@dataclass(frozen=True)
class Residuals:
    """Residuals of a ControlNet, added after the blocks of the base; each entry serves a run of neighbouring blocks."""

    double: tuple[Tensor, ...] = ()
    """(B, N, D) each, to the image tokens."""
    single: tuple[Tensor, ...] = ()
    """(B, L+N, D) each, to the whole sequence, text first."""

    def times(self, strength: float | Tensor, dtype: torch.dtype | None = None) -> Residuals:
        """Scaled copies, cast to `dtype` first if one is given, as the reference does (PixelPonder's pipeline.py)."""
        return Residuals(*(tuple(r.to(dtype or r.dtype) * strength for r in rs) for rs in (self.double, self.single)))


def residual_index(block: int, blocks: int, residuals: int) -> int:
    """Which residual a block of the base receives: contiguous runs of ceil(blocks / residuals), not interleaved."""
    return block // math.ceil(blocks / residuals)


class FluxTrunk(nn.Module):
    """Embedders and blocks, which the base and a ControlNet for it have in common."""

    def __init__(self, config: FluxConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        D = config.hidden
        self.dtype, self.trunk = dtype, config
        self.gradient_checkpointing = False
        self.img_in = operations.Linear(config.in_channels, D, **to)
        self.time_in = MLPEmbedder(TIME_CHANNELS, D, operations, to)
        self.vector_in = MLPEmbedder(config.pooled_dim, D, operations, to)
        if config.guidance:
            self.guidance_in = MLPEmbedder(TIME_CHANNELS, D, operations, to)
        self.txt_in = operations.Linear(config.context_dim, D, **to)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config, operations, to) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, operations, to) for _ in range(config.single_depth)
        )

    def embed(
        self, img: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None,
        img_ids: Tensor, txt_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(image tokens (B, N, D), text tokens (B, L, D), vec (B, D), rope of [text, image])."""
        config = self.trunk
        _refuse_wrong_inputs(config, img, context, pooled, guidance, img_ids)
        vec = self.time_in(sinusoid(1000 * timestep.float()).to(img.dtype))
        if config.guidance:
            vec = vec + self.guidance_in(sinusoid(1000 * guidance.float()).to(img.dtype))
        vec = vec + self.vector_in(pooled)
        if txt_ids is None:  # text has no place
            txt_ids = img_ids.new_zeros((*img_ids.shape[:-2], context.shape[1], 3))
        rope = rope_table(torch.cat((txt_ids, img_ids), dim=-2), config.axes, config.theta).to(img.device)
        return self.img_in(img), self.txt_in(context), vec, rope

    def run(self, block: nn.Module, *inputs):
        return checkpointing.run(block, *inputs, checkpointed=self.gradient_checkpointing)


class Flux(FluxTrunk):
    def __init__(self, config: FluxConfig, operations=nn, dtype=None, device=None):
        super().__init__(config, operations, dtype, device)
        self.config = config
        self.final_layer = FluxFinalLayer(config, operations, dict(dtype=dtype, device=device))

    def forward(
        self,
        img: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        *,
        img_ids: Tensor,
        txt_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        attention: Callable = dense_attention,
    ) -> Tensor:
        """Velocity noise - sample of the rectified flow.

        img: (B, N, in_channels) noisy tokens (`pack`); timestep: (B,) = sigma in [0, 1]; context: (B, L, context_dim)
        T5 tokens, never masked; pooled: (B, pooled_dim) of CLIP-L; guidance: (B,) distilled guidance, needed by dev;
        img_ids: (N, 3) or (B, N, 3), see `positions`; txt_ids: the same of the text, zeros when not given; residuals:
        from a ControlNet, already scaled. Returns (B, N, in_channels).
        """
        residuals = residuals or Residuals()
        img, txt, vec, rope = self.embed(img, timestep, context, pooled, guidance, img_ids, txt_ids)
        for i, block in enumerate(self.double_blocks):
            img, txt = self.run(block, img, txt, vec, rope, attention)
            if residuals.double:
                img = img + residuals.double[residual_index(i, len(self.double_blocks), len(residuals.double))]
        x = torch.cat((txt, img), dim=1)  # (B, L+N, D)
        for i, block in enumerate(self.single_blocks):
            x = self.run(block, x, vec, rope, attention)
            if residuals.single:
                x = x + residuals.single[residual_index(i, len(self.single_blocks), len(residuals.single))]
        return self.final_layer(x[:, txt.shape[1] :], vec)


def _refuse_wrong_inputs(config: FluxConfig, img, context, pooled, guidance, img_ids):
    if config.guidance and guidance is None:
        raise ValueError("This FLUX checkpoint is distilled with guidance (dev), so it needs a value: 4.0 for "
                         "PixelPonder.")
    if img_ids.shape[-2] != img.shape[1]:
        raise ValueError(f"There are {img.shape[1]} image tokens but {img_ids.shape[-2]} positions.")
    for what, tensor, width, encoder in (
        ("image tokens", img, config.in_channels, "a latent of FLUX's VAE, packed"),
        ("text tokens", context, config.context_dim, "the T5-XXL encoder of FLUX"),
        ("pooled text vector", pooled, config.pooled_dim, "the CLIP-L encoder of FLUX"),
    ):
        if tensor.shape[-1] != width:
            raise ValueError(f"The {what} are {tensor.shape[-1]} wide, this FLUX checkpoint was trained with {width}: "
                             f"use {encoder}.")
