"""The PixArt transformer (arXiv 2310.00426, section 2.3; 2403.04692, section 3.3; PixArt-alpha/PixArt-sigma@1ce521a).

A DiT on VAE latents whose adaLN is computed once for all blocks (adaLN-single) and whose text enters through an ungated
cross attention on the raw residual. One class for the single-scale and the multi-scale networks of the release: they
differ in where the table of positions comes from, and here it is always computed for the current grid.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attention as dense_attention
from ...kernels.modulated_norm import modulated_norm
from .. import checkpointing
from ..layers import sinusoid
from .config import VAE_FACTOR, KVCompression, PixArtConfig

EPS = 1e-6
KEPT_AXES = 32  # tables, one a side length


def axis_table(n: int, channels: int, position_range: float, device=None, dtype=torch.float32) -> Tensor:
    """Positions i/n * position_range along one side as (n, channels): [sin | cos], slowest frequency last.

    In float64 on the CPU, as numpy made those that the weights were trained with, then moved.
    """
    half = channels // 2
    position = torch.arange(n, dtype=torch.float64) / n * position_range
    angle = position[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat((angle.sin(), angle.cos()), dim=1).to(device=device, dtype=dtype)


def position_table(rows: Tensor, columns: Tensor) -> Tensor:
    """(h, D/2) and (w, D/2) -> (h*w, D), tokens in reading order: released weights have the COLUMN's half first."""
    h, w = len(rows), len(columns)
    return torch.cat((columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)), dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class TextTokens:
    """A prompt as the blocks read it; depends on neither the noisy latent nor the timestep."""

    tokens: Tensor
    """(B, L, D) after y_embedder."""
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None
    """(keys, values) of each block, (B, heads, L, D/heads) each; None: the blocks compute their own."""
    mask: Tensor | None = None
    """(B, 1, 1, L) to add to scores, the lowest number where a token is not read; None: all are read."""
    has_text: Tensor | None = None
    """(B, 1, 1, 1) bool: whether a prompt has a token left; where not, its values are zeros."""


@dataclass(frozen=True)
class SharedInputs:
    """Inputs that all blocks of one forward pass share."""

    modulation: Tensor
    """(B, 6, D) of t_block."""
    text: TextTokens
    grid: tuple[int, int]
    """(height, width) in tokens."""
    attention: Callable


class ControlNetwork(Protocol):
    """What a PixArt asks of a ControlNet, `controlnet.PixArtControlNet`."""

    def residuals(self, x: Tensor, hint: Tensor, shared: SharedInputs, run: Callable,
                  before_block: Callable[[nn.Module | None], None]) -> Iterator[Tensor]:
        """Residuals, added to the tokens before block 1, 2, ... of the base model, (B, N, D) each.

        x: (B, N, D) tokens that leave its block 0; hint: (B or 1, N, D) embedded by the base model, positions included;
        run: how the base model runs a block, `run(block, tokens, shared)`; before_block: called with each block of this
        network before any of it runs, and with None after the last.
        """


@dataclass(frozen=True)
class HintedControlNet:
    """One ControlNet in one forward pass."""

    net: ControlNetwork
    hint: Tensor
    """(B or 1, 4, H, W): the VAE latent of the hint image times latent_scale, of the size of the noisy latent."""
    strength: float | Tensor = 1.0
    """Factor of the residuals; a tensor broadcasts to (B, N, 1), N tokens in reading order."""
    before_block: Callable[[nn.Module | None], None] = lambda block: None
    """See `ControlNetwork.residuals`."""


class Embedder(nn.Module):
    """Scalars -> (B, D): the timestep, or a size in pixels."""

    def __init__(self, hidden: int, operations, to: dict):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(256, hidden, **to), nn.SiLU(), operations.Linear(hidden, hidden, **to)
        )

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(value).to(dtype))


class PixArtMLP(nn.Module):
    def __init__(self, width: int, hidden: int, out: int, operations, to: dict):
        super().__init__()
        self.fc1 = operations.Linear(width, hidden, **to)
        self.fc2 = operations.Linear(hidden, out, **to)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text tokens of the encoder -> (B, L, D), and the caption that stands for no caption in training."""

    def __init__(self, config: PixArtConfig, operations, to: dict):
        super().__init__()
        self.y_proj = PixArtMLP(config.context_dim, config.hidden, config.hidden, operations, to)
        if config.null_caption:
            self.register_buffer("y_embedding", torch.empty(config.token_limit, config.context_dim, **to))

    def forward(self, context: Tensor) -> Tensor:
        return self.y_proj(context)

    def drop(self, context: Tensor, dropped: Tensor) -> Tensor:
        """The null caption in place of the whole caption of the samples that are `dropped`.

        context: (B, L, context_dim), L at most token_limit; dropped: (B,) bool. Released behaviour: the mask of the
        dropped caption stays as it is, so an unconditional sample has as many tokens as its caption had.
        """
        null = getattr(self, "y_embedding", None)
        if null is None:
            raise ValueError("This PixArt checkpoint stores no null caption (y_embedder.y_embedding), as files in "
                             "diffusers' format do not. Use the tokens of an empty prompt.")
        L = context.shape[1]
        if L > len(null):
            raise ValueError(f"The captions have {L} tokens, the null caption {len(null)}. Cut them to {len(null)}.")
        return torch.where(dropped[:, None, None], null[:L].to(context), context)


class PixArtPatchEmbed(nn.Module):
    def __init__(self, config: PixArtConfig, operations, to: dict):
        super().__init__()
        p = config.patch_size
        self.proj = operations.Conv2d(config.in_channels, config.hidden, kernel_size=p, stride=p, **to)

    def forward(self, x: Tensor) -> Tensor:
        # (B, C, H, W) -> (B, N, D). Contiguous, because every tensor of the residual stream inherits these strides, and
        # norms and projections would copy each of them.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class PixArtSelfAttention(nn.Module):
    """Norms are over all heads together, before the split, and before keys and values are compressed."""

    def __init__(self, config: PixArtConfig, compression: KVCompression | None, operations, to: dict):
        super().__init__()
        D = config.hidden
        self.heads, self.compression, self.qk_norm = config.heads, compression, config.qk_norm
        self.qkv = operations.Linear(D, 3 * D, **to)
        self.proj = operations.Linear(D, D, **to)
        if config.qk_norm:
            self.q_norm = operations.LayerNorm(D, **to)
            self.k_norm = operations.LayerNorm(D, **to)
        if compression and compression.sampling == "conv":
            f = compression.factor
            self.sr = operations.Conv2d(D, D, kernel_size=f, stride=f, groups=D, **to)
            self.norm = operations.LayerNorm(D, **to)

    def forward(self, x: Tensor, grid: tuple[int, int], attention: Callable) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
        if self.qk_norm:
            q, k = self.q_norm(q).to(v), self.k_norm(k).to(v)  # under autocast a norm gives float32
        if self.compression:
            k, v = self.compress(k, grid), self.compress(v, grid)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D/heads)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))

    def compress(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) -> (B, N', D); rows and columns that do not fill a factor are left out."""
        f = self.compression.factor
        if self.compression.sampling == "uniform_every":
            return x[:, ::f]
        height, width = grid
        if height < f or width < f:
            raise ValueError(f"KV compression by {f} needs at least {f}x{f} tokens, this latent has {width}x{height}.")
        x = x.unflatten(1, grid)  # (B, h, w, D)
        if self.compression.sampling == "conv":
            return self.norm(self.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)).to(x.dtype)
        # The reference's "ave" interpolates to the nearest, so it averages nothing: it is "uniform".
        return x[:, : height // f * f : f, : width // f * f : f].flatten(1, 2)


class CrossAttention(nn.Module):
    def __init__(self, config: PixArtConfig, operations, to: dict):
        super().__init__()
        D = config.hidden
        self.heads = config.heads
        self.q_linear = operations.Linear(D, D, **to)
        self.kv_linear = operations.Linear(D, 2 * D, **to)
        self.proj = operations.Linear(D, D, **to)

    def keys_values(self, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, heads, L, D/heads) each."""
        k, v = self.kv_linear(text.tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v if text.has_text is None else v * text.has_text

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], shared: SharedInputs) -> Tensor:
        k, v = keys_values
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.proj(shared.attention(q, k, v, mask=shared.text.mask).transpose(1, 2).flatten(2))


class PixArtBlock(nn.Module):
    """adaLN-single (arXiv 2310.00426, section 2.3): one modulation for all blocks plus a table of the block's own."""

    def __init__(self, config: PixArtConfig, index: int, operations, to: dict):
        super().__init__()
        D, compression = config.hidden, config.kv_compression
        self.attn = PixArtSelfAttention(
            config, compression if compression and index in compression.layers else None, operations, to
        )
        self.cross_attn = CrossAttention(config, operations, to)
        self.mlp = PixArtMLP(D, config.mlp_hidden, D, operations, to)
        self.scale_shift_table = nn.Parameter(torch.empty(6, D, **to))

    def forward(self, x: Tensor, shared: SharedInputs, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        # x: (B, N, D); keys_values: of the text, if they are known
        modulation = self.scale_shift_table.to(shared.modulation) + shared.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)  # each (B, 1, D)
        x = torch.addcmul(x, gate1, self.attn(modulated_norm(x, shift1, scale1), shared.grid, shared.attention))
        if keys_values is None:
            keys_values = self.cross_attn.keys_values(shared.text)
        x = x + self.cross_attn(x, keys_values, shared)
        return torch.addcmul(x, gate2, self.mlp(modulated_norm(x, shift2, scale2)))


class PixArtFinalLayer(nn.Module):
    def __init__(self, config: PixArtConfig, operations, to: dict):
        super().__init__()
        self.linear = operations.Linear(config.hidden, config.patch_size**2 * config.out_channels, **to)
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden, **to))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # t: (B, D) of the timestep's embedder, not of t_block
        shift, scale = (self.scale_shift_table.to(t) + t[:, None]).chunk(2, dim=1)  # each (B, 1, D)
        return self.linear(modulated_norm(x, shift, scale))


def _masked(tokens: Tensor, mask: Tensor | None) -> TextTokens:
    """Tokens (B, L, D) with a mask (B or 1, L), True = keep. Raises ValueError for another shape."""
    if mask is None:
        return TextTokens(tokens)
    B, L, _ = tokens.shape
    if mask.shape not in ((B, L), (1, L)):
        raise ValueError(f"The text mask is {tuple(mask.shape)}, the text tokens are {(B, L)}.")
    keep = mask.bool()[:, None, None]  # (B, 1, 1, L)
    has_text = keep.any(dim=-1, keepdim=True)
    # A softmax over nothing is NaN: where no token is kept, all are, and their values are zeros.
    added = torch.zeros_like(keep, dtype=tokens.dtype).masked_fill(~keep & has_text, torch.finfo(tokens.dtype).min)
    return TextTokens(tokens, mask=added, has_text=has_text)


class PixArt(nn.Module):
    def __init__(self, config: PixArtConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        D = config.hidden
        self.config, self.dtype = config, dtype
        self.gradient_checkpointing = False
        self.x_embedder = PixArtPatchEmbed(config, operations, to)
        self.t_embedder = Embedder(D, operations, to)
        if config.micro_conditions:
            self.csize_embedder = Embedder(D // 3, operations, to)
            self.ar_embedder = Embedder(D // 3, operations, to)
        self.t_block = nn.Sequential(nn.SiLU(), operations.Linear(D, 6 * D, **to))
        self.y_embedder = CaptionEmbedder(config, operations, to)
        self.blocks = nn.ModuleList(PixArtBlock(config, i, operations, to) for i in range(config.depth))
        self.final_layer = PixArtFinalLayer(config, operations, to)
        self._axes: dict[tuple, Tensor] = {}

    def initialise(self) -> PixArt:
        """The reference's: cross attention and output begin at zero, KV compression as a mean. Returns self."""
        D = self.config.hidden
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        embedders = [self.t_embedder.mlp, self.t_block, *self.y_embedder.y_proj.children()]
        if self.config.micro_conditions:
            embedders += [self.csize_embedder.mlp, self.ar_embedder.mlp]
        for linear in (m for e in embedders for m in e.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
        if self.config.null_caption:
            nn.init.normal_(self.y_embedder.y_embedding, std=self.config.context_dim**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.scale_shift_table, std=D**-0.5)
            nn.init.zeros_(block.cross_attn.proj.weight)
            if block.attn.compression and block.attn.compression.sampling == "conv":
                nn.init.constant_(block.attn.sr.weight, block.attn.compression.factor**-2)
                nn.init.zeros_(block.attn.sr.bias)
        nn.init.normal_(self.final_layer.scale_shift_table, std=D**-0.5)
        nn.init.zeros_(self.final_layer.linear.weight)
        return self

    def encode_text(self, context: Tensor, mask: Tensor | None = None) -> TextTokens:
        """context, mask: see `forward`, which takes the result as `text`, once for all steps."""
        text = self._read(context, mask)
        return replace(text, keys_values=tuple(block.cross_attn.keys_values(text) for block in self.blocks))

    def _read(self, context: Tensor | None, mask: Tensor | None) -> TextTokens:
        self._refuse_wrong_context(context)
        return _masked(self.y_embedder(context), mask)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        attention: Callable = dense_attention,
        control: Sequence[HintedControlNet] = (),
        text: TextTokens | None = None,
        before_block: Callable[[nn.Module | None], None] = lambda block: None,
    ) -> Tensor:
        """Predicted noise (or velocity) and, if the network has one, the variance.

        x: (B, 4, H, W) noisy latent times latent_scale; timestep: (B,) in [0, 999], fractional allowed; context: (B, L,
        context_dim) text tokens with mask (B or 1, L), True = keep, of which a row may be all False: its cross
        attention then adds nothing but the bias of its projection, as if it read no token; size: (B or 1, 2) (height,
        width) in pixels and aspect_ratio: (B or 1, 1) height/width of the picture, by default those of x, read only by
        micro-conditioned networks; control: see `HintedControlNet`; text: `encode_text(context, mask)`, in
        which case neither of these is read; before_block: called with each of `blocks` before it runs, so that a host
        can fetch its weights, and with None after the last. Returns (B, out_channels, H, W): in_channels of prediction,
        then as many of variance.
        """
        p, (B, _, H, W) = self.config.patch_size, x.shape
        if H % p or W % p:
            raise ValueError(f"PixArt cannot cut a latent of {W}x{H} cells into patches of {p}x{p}: width and height "
                             f"in pixels must be multiples of {self.config.size_multiple}.")
        if text is None:
            text = self._read(context, mask)
        if len(text.tokens) != B:
            raise ValueError(f"There are {len(text.tokens)} texts for {B} latents.")
        grid = (H // p, W // p)
        h = self._embed(x)  # (B, N, D), float32 under autocast, as the reference keeps its residual stream
        t = self.t_embedder(timestep, h.dtype)  # (B, D)
        if self.config.micro_conditions:
            t = t + self._micro_conditions(x, size, aspect_ratio, h.dtype)
        modulation = self.t_block(t).to(h.dtype).unflatten(1, (6, -1))  # (B, 6, D)
        shared = SharedInputs(modulation, text, grid, attention)

        keys_values = text.keys_values or (None,) * len(self.blocks)
        before_block(self.blocks[0])
        h = self._run(self.blocks[0], h, shared, keys_values[0])
        # Each control starts from the tokens as the first block left them, and its residuals depend on no other's.
        streams = [(c.strength, c.net.residuals(h, self._embed_hint(c.hint, x), shared, self._run, c.before_block))
                   for c in control]
        for block, known in zip(self.blocks[1:], keys_values[1:], strict=True):
            for strength, residuals in streams:
                residual = next(residuals, None)
                if residual is not None:
                    h = h + strength * residual
            before_block(block)
            h = self._run(block, h, shared, known)
        before_block(None)

        h = self.final_layer(h, t.to(h.dtype)).unflatten(1, grid).unflatten(-1, (p, p, -1))  # (B, h, w, p, q, C)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h*p, w*q)

    def _run(self, block: PixArtBlock, *inputs) -> Tensor:
        return checkpointing.run(block, *inputs, checkpointed=self.gradient_checkpointing)

    def _embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> tokens with their positions, (B, N, D)."""
        rows, columns = (self._axis(n // self.config.patch_size, x.device, x.dtype) for n in x.shape[2:])
        return self.x_embedder(x) + position_table(rows, columns)

    def _embed_hint(self, hint: Tensor, x: Tensor) -> Tensor:
        if hint.shape[1:] != x.shape[1:] or len(hint) not in (1, len(x)):
            raise ValueError(f"The hint of a ControlNet is {tuple(hint.shape)}, the latent {tuple(x.shape)}: encode "
                             "the hint image at the size of the picture.")
        return self._embed(hint)

    def _axis(self, n: int, device, dtype) -> Tensor:
        key = (n, device, dtype)
        if key not in self._axes:
            if len(self._axes) == KEPT_AXES:
                del self._axes[next(iter(self._axes))]
            self._axes[key] = axis_table(n, self.config.hidden // 2, self.config.position_range, device, dtype)
        return self._axes[key]

    def _micro_conditions(self, x: Tensor, size: Tensor | None, aspect_ratio: Tensor | None, dtype) -> Tensor:
        """(B or 1, D): height, width and aspect ratio, a third of the channels each."""
        H, W = x.shape[2:]
        if size is None:  # filled in on the device: copying a tensor there waits
            size = torch.stack([x.new_full((1,), VAE_FACTOR * n, dtype=torch.float32) for n in (H, W)], dim=1)
        if aspect_ratio is None:
            aspect_ratio = x.new_full((1, 1), H / W, dtype=torch.float32)
        height, width = (self.csize_embedder(n, dtype) for n in size.unbind(1))
        return torch.cat((height, width, self.ar_embedder(aspect_ratio.flatten(), dtype)), dim=1)

    def _refuse_wrong_context(self, context: Tensor | None):
        if context is None:
            raise ValueError("PixArt needs the tokens of its text encoder, T5 v1.1 XXL.")
        if context.ndim != 3 or context.shape[-1] != self.config.context_dim:
            raise ValueError(f"The text tokens are {tuple(context.shape)}, this PixArt checkpoint was trained with "
                             f"(B, L, {self.config.context_dim}): use the text encoder that belongs to it.")
