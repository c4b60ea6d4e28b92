"""The PixelFlow transformer (arXiv 2504.07963, section 3.3; pixelflow/model.py of ShoufaChen/PixelFlow@8805204).

A DiT on pixel patches. Beyond DiT it is conditioned on the size of its canvas (tokens per side), turns queries and keys
by a two-dimensional rope, normalises them, and, when text-conditional, has an ungated cross attention in every block.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attention as dense_attention
from ...kernels.modulated_norm import modulate, modulated_norm
from ...kernels.rope import rope_matrices, rotate
from ...kernels.varlen_attention import packed_attention
from .. import checkpointing
from ..layers import sinusoid, unpatchify
from .config import PixelFlowConfig

EPS = 1e-6
KEPT_ROPES = 16  # tables, one a grid: the stages of two or three picture sizes


def rope_table(height: int, width: int, head_dim: int, device=None, theta: float = 10000.0) -> Tensor:
    """Rotations of the two-dimensional rope: (height*width, 1, head_dim/2, 2, 2) float32, rows first, for all heads.

    The first half of the channels turns with the column, the second with the row; positions are whole tokens and are
    not rescaled between stages.
    """
    quarter = head_dim // 4
    # In float64, as numpy made those that the weights were trained with, so on the CPU: not every GPU has it.
    frequency = theta ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angle = torch.cat((column.flatten()[:, None] * frequency, row.flatten()[:, None] * frequency), dim=1)
    return rope_matrices(angle)[:, None].to(device)


class SinusoidEmbedder(nn.Module):
    """A scalar (timestep, or tokens per side) -> (B, D)."""

    def __init__(self, hidden: int, operations, to: dict):
        super().__init__()
        self.linear_1 = operations.Linear(256, hidden, **to)
        self.linear_2 = operations.Linear(hidden, hidden, **to)

    def forward(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(position, exact_end=True).to(dtype))))


class ClassEmbedder(nn.Module):
    """Class index -> (B, D); the last row is the null class."""

    def __init__(self, num_classes: int, hidden: int, operations, to: dict):
        super().__init__()
        self.embedding_table = operations.Embedding(num_classes + 1, hidden, **to)

    def forward(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        return self.embedding_table(labels).to(dtype)


class PixelFlowPatchEmbed(nn.Module):
    def __init__(self, config: PixelFlowConfig, operations, to: dict):
        super().__init__()
        p = config.patch_size
        self.proj = operations.Conv2d(config.in_channels, config.hidden, kernel_size=p, stride=p, **to)

    def forward(self, x: Tensor) -> Tensor:
        # (B, C, H, W) -> (B, N, D). Contiguous, because every tensor of the residual stream inherits these strides, and
        # norms and projections would copy each of them.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()

    def rows(self, x: Tensor) -> Tensor:
        """Tokens (N, D) of packed patches (N, C*p*p), whose rows are ordered (c ph pw)."""
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class PixelFlowModulation(nn.Module):
    """adaLN-Zero (arXiv 2212.09748, section 3.2): `chunks` tensors of (..., D) from the conditioning."""

    def __init__(self, hidden: int, chunks: int, operations, to: dict):
        super().__init__()
        self.chunks = chunks
        self.linear = operations.Linear(hidden, chunks * hidden, **to)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.chunks, dim=-1)


class PixelFlowAttention(nn.Module):
    """Attention whose queries and keys are normalised over all heads together, before the split. Only self attention
    turns its keys."""

    def __init__(self, config: PixelFlowConfig, context_dim: int, operations, to: dict):
        super().__init__()
        D, bias = config.hidden, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = operations.Linear(D, D, bias=bias, **to)
        self.k_proj = operations.Linear(context_dim, D, bias=bias, **to)
        self.v_proj = operations.Linear(context_dim, D, bias=bias, **to)
        self.o_proj = operations.Linear(D, D, bias=bias, **to)
        self.q_norm = operations.RMSNorm(D, eps=EPS, **to)
        self.k_norm = operations.RMSNorm(D, eps=EPS, **to)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(..., L, C) -> keys, not turned, and values, (..., L, H, D/H) each."""
        k, v = self.k_norm(self.k_proj(source)), self.v_proj(source)
        return k.unflatten(-1, (-1, self.head_dim)), v.unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, rope: Tensor, attend: Callable, text: tuple[Tensor, Tensor] | None = None) -> Tensor:
        # x: (..., N, D); text: its keys and values; heads are split as (..., N, H, D/H)
        q = rotate(self.q_norm(self.q_proj(x)).unflatten(-1, (-1, self.head_dim)), rope)
        k, v = self.keys_values(x) if text is None else text
        if text is None:  # released behaviour: cross attention turns the queries but not the keys
            k = rotate(k, rope)
        return self.o_proj(attend(q, k, v).flatten(-2))


class PixelFlowMLP(nn.Module):
    def __init__(self, hidden: int, operations, to: dict):
        super().__init__()
        self.fc1 = operations.Linear(hidden, 4 * hidden, **to)
        self.fc2 = operations.Linear(4 * hidden, hidden, **to)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PixelFlowBlock(nn.Module):
    def __init__(self, config: PixelFlowConfig, operations, to: dict):
        super().__init__()
        D = config.hidden
        self.norm1 = PixelFlowModulation(D, 6, operations, to)
        self.attn1 = PixelFlowAttention(config, D, operations, to)
        if config.text_conditional:
            self.norm2 = operations.RMSNorm(D, eps=EPS, **to)
            self.attn2 = PixelFlowAttention(config, config.context_dim, operations, to)
        self.norm3 = operations.RMSNorm(D, eps=EPS, **to)
        self.mlp = PixelFlowMLP(D, operations, to)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None, flow: TokenLayout,
                text: tuple[Tensor, Tensor] | None = None) -> Tensor:
        # x: (..., N, D); condition: (B, D), spread over the tokens of its picture; text: keys and values of the
        # context, if they are known
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(condition)
        y = flow.per_item(modulated_norm, (x,), (shift1, scale1))
        x = flow.per_item(gated, (x, self.attn1(y, flow.rope, flow.attend_self)), (gate1,))
        if text is None and context is not None:
            text = self.attn2.keys_values(context)
        if text is not None:
            x = x + self.attn2(self.norm2(x), flow.rope, flow.attend_text, text)
        y = flow.per_item(modulate, (self.norm3(x),), (shift2, scale2))
        return flow.per_item(gated, (x, self.mlp(y)), (gate2,))


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, y)


@dataclass(frozen=True)
class TokenLayout:
    """Layout of the tokens of one forward pass: dense (B, N, D), or packed (N, D)."""

    rope: Tensor
    per_item: Callable
    """(f, tokens, rows): see `per_picture`."""
    attend_self: Callable
    attend_text: Callable


def per_picture(f: Callable, tokens: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """f(*tokens, *rows) of dense tokens, (B, N, D) each, and of rows (B, D) that count for each token of a picture."""
    return f(*tokens, *(row[:, None] for row in rows))


def per_packed_item(lengths: Sequence[int], device) -> Callable:
    """`per_picture` of packed tokens, (N, D) each. Items of equal lengths are taken together as dense ones, so that a
    row is neither repeated for every token nor its gradient added up from them."""
    runs = [(len(list(run)), n) for n, run in groupby(lengths)]  # (items, tokens of each)
    item = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)  # (N,)

    def per_item(f, tokens, rows):
        if torch.compiler.is_compiling():  # one graph for all lengths
            return f(*tokens, *(row[item] for row in rows))
        if len(runs) == 1:
            return per_picture(f, [t.unflatten(0, runs[0]) for t in tokens], rows).flatten(0, 1)
        tokens = [t.split([items * n for items, n in runs]) for t in tokens]
        rows = [row.split([items for items, _ in runs]) for row in rows]
        found = []
        for i, run in enumerate(runs):
            own = [t[i].unflatten(0, run) for t in tokens]
            found.append(per_picture(f, own, [row[i] for row in rows]).flatten(0, 1))
        return torch.cat(found)

    return per_item


@dataclass(frozen=True)
class TextKeysValues:
    """A prompt as the blocks read it; depends on neither the picture nor the timestep nor the stage."""

    blocks: tuple[tuple[Tensor, Tensor], ...]
    """(keys, values) for each block, (B, L, H, D/H) each."""
    mask: Tensor | None
    """See `attention_mask`."""


def attention_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, L), True = keep -> (B, 1, 1, L) to add to scores in `dtype`, made once for all blocks."""
    if mask is None:
        return None
    keep = mask.bool()[:, None, None]
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


@dataclass(frozen=True)
class PackedLayout:
    """Which packed rows belong to which item."""

    grids: tuple[tuple[int, int], ...]
    """(height, width) in tokens, one per item; its rows are row-major, items end to end."""
    context_lengths: tuple[int, ...] | None = None
    """Text tokens of each item; None without text."""

    @property
    def lengths(self) -> list[int]:
        return [h * w for h, w in self.grids]


class PixelFlow(nn.Module):
    def __init__(self, config: PixelFlowConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        D, p = config.hidden, config.patch_size
        self.config, self.dtype = config, dtype
        self.gradient_checkpointing = False
        self.patch_embed = PixelFlowPatchEmbed(config, operations, to)
        self.timestep_embedder = SinusoidEmbedder(D, operations, to)
        self.latent_size_embedder = SinusoidEmbedder(D, operations, to)
        if config.num_classes:
            self.class_embedder = ClassEmbedder(config.num_classes, D, operations, to)
        self.transformer_blocks = nn.ModuleList(PixelFlowBlock(config, operations, to) for _ in range(config.depth))
        self.proj_out_1 = operations.Linear(D, 2 * D, **to)
        self.proj_out_2 = operations.Linear(D, p * p * config.out_channels, **to)
        self._ropes: dict[tuple, Tensor] = {}

    def initialise(self) -> PixelFlow:
        """The reference's initialisation: Xavier, N(0, 0.02) embedders, and zeros where a block begins as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in (self.timestep_embedder, self.latent_size_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        if self.config.num_classes:
            nn.init.normal_(self.class_embedder.embedding_table.weight, std=0.02)
        for linear in (*(b.norm1.linear for b in self.transformer_blocks), self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self

    def encode_text(self, context: Tensor, mask: Tensor | None = None) -> TextKeysValues:
        """context, mask: see `forward`, which takes the result as `text`, once for all steps."""
        self._refuse_wrong_context(context)
        blocks = tuple(block.attn2.keys_values(context) for block in self.transformer_blocks)
        return TextKeysValues(blocks, attention_mask(mask, blocks[0][0].dtype))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        latent_size: Tensor | float | None = None,
        rope: Tensor | None = None,
        attention: Callable = dense_attention,
        text: TextKeysValues | None = None,
        before_block: Callable[[nn.Module | None], None] = lambda block: None,
    ) -> Tensor:
        """Velocity of the flow inside a stage.

        x: (B, C, H, W) noisy pixels in the range of [-1, 1]; timestep: (B,) in [0, 1000); context: (B, L, context_dim)
        text tokens with mask (B, L), True = keep; class_labels: (B,), `num_classes` is the null class; latent_size:
        tokens per side, by default sqrt(rows*columns), as training did for a square; rope: see `rope_table`, made here
        when not given; text: `encode_text(context, mask)`, in which case neither of these is read; before_block: called
        with each of `transformer_blocks` before it runs, so that a host can fetch its weights, and with None after the
        last. Returns (B, out_channels, H, W).
        """
        self._refuse_wrong_conditions(context, class_labels, text)
        B, _, H, W = x.shape
        p = self.config.patch_size
        if H % p or W % p:
            raise ValueError(f"PixelFlow cannot cut {W}x{H} pixels into patches of {p}x{p}: both sides must be "
                             f"multiples of {p}.")
        grid = (H // p, W // p)
        if latent_size is None:
            latent_size = math.sqrt(grid[0] * grid[1])
        if not isinstance(latent_size, Tensor):
            latent_size = torch.full((B,), latent_size, dtype=torch.float32, device=x.device)  # waits for nothing
        latent_size = latent_size.to(x.device, torch.float32).expand(B)
        # Under autocast, attention casts it as it does queries and keys.
        added = attention_mask(mask, x.dtype) if text is None else text.mask

        def attend(q, k, v, mask=None):  # (B, N, H, D/H), as the blocks split heads
            return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask).transpose(1, 2)

        flow = TokenLayout(
            rope=(self.rope(*grid, x.device) if rope is None else rope)[None],
            per_item=per_picture,
            attend_self=attend,
            attend_text=partial(attend, mask=added),
        )
        h = self._transform(self.patch_embed(x), timestep, latent_size, context, class_labels, flow, text,
                            before_block)  # (B, N, p*p*C)
        return unpatchify(h, grid, p)

    def forward_packed(
        self,
        x: Tensor,
        timestep: Tensor,
        layout: PackedLayout,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
        attention: Callable = packed_attention,
    ) -> Tensor:
        """`forward` for items of different sizes at once, as training packs the stages (section 3.3, "Training").

        x: (N, C*p*p) patches of all items end to end, each row ordered (c ph pw); timestep, class_labels: (S,), one per
        item; context: (K, context_dim) text tokens of all items end to end. Returns (N, out_channels*p*p), rows
        ordered like those of x.
        """
        self._refuse_wrong_conditions(context, class_labels)
        lengths = layout.lengths
        latent_size = torch.tensor([math.sqrt(h * w) for h, w in layout.grids], device=x.device)
        flow = TokenLayout(
            rope=torch.cat([self.rope(*grid, x.device) for grid in layout.grids]),
            per_item=per_packed_item(lengths, x.device),
            attend_self=partial(attention, lengths_q=lengths, lengths_k=lengths),
            attend_text=partial(attention, lengths_q=lengths, lengths_k=list(layout.context_lengths or ())),
        )
        h = self._transform(self.patch_embed.rows(x), timestep, latent_size, context, class_labels, flow)
        return h.unflatten(-1, (-1, self.config.out_channels)).transpose(-1, -2).flatten(-2)  # (p q c) -> (c p q)

    def _transform(self, h, timestep, latent_size, context, class_labels, flow: TokenLayout,
                   text: TextKeysValues | None = None, before_block: Callable = lambda block: None) -> Tensor:
        condition = self.timestep_embedder(timestep, h.dtype)  # (B, D)
        if class_labels is not None:
            condition = condition + self.class_embedder(class_labels, h.dtype)
        condition = condition + self.latent_size_embedder(latent_size, h.dtype)
        known = (None,) * len(self.transformer_blocks) if text is None else text.blocks
        for block, keys_values in zip(self.transformer_blocks, known, strict=True):
            before_block(block)
            h = checkpointing.run(block, h, condition, context, flow, keys_values,
                                  checkpointed=self.gradient_checkpointing)
        before_block(None)
        shift_scale = self.proj_out_1(F.silu(condition)).chunk(2, dim=-1)
        return self.proj_out_2(flow.per_item(modulated_norm, (h,), shift_scale))

    def rope(self, height: int, width: int, device) -> Tensor:
        """`rope_table` of a grid of tokens, kept for the next pass."""
        key = (height, width, device)
        if key not in self._ropes:
            if len(self._ropes) == KEPT_ROPES:
                del self._ropes[next(iter(self._ropes))]
            self._ropes[key] = rope_table(height, width, self.config.head_dim, device)
        return self._ropes[key]

    def _refuse_wrong_conditions(self, context, class_labels, text=None):
        config = self.config
        if text is None:
            self._refuse_wrong_context(context)
        if config.num_classes and class_labels is None:
            raise ValueError(f"This PixelFlow checkpoint needs a class: 0 to {config.num_classes - 1}, or the null "
                             f"class {config.num_classes}.")
        if not config.num_classes and class_labels is not None:
            raise ValueError("This PixelFlow checkpoint has no class embedding: it takes a text, not a class.")

    def _refuse_wrong_context(self, context: Tensor | None):
        config = self.config
        if config.text_conditional and context is None:
            raise ValueError("This PixelFlow checkpoint is text-conditional: it needs the tokens of a text encoder.")
        if not config.text_conditional and context is not None:
            raise ValueError("This PixelFlow checkpoint is class-conditional: it takes no text.")
        if context is not None and context.shape[-1] != config.context_dim:
            raise ValueError(f"The text tokens are {context.shape[-1]} wide, this PixelFlow checkpoint was trained "
                             f"with {config.context_dim}: use the text encoder that belongs to it.")
