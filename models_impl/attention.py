"""Attention as a plain function, dense and packed. Models take it as an argument, so a host can give its own."""
from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from xformers.ops import fmha, memory_efficient_attention
except ImportError:
    memory_efficient_attention = fmha = None

SHORT = 256 * 256  # scores per head


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q: (B, H, N, D); k, v: (B, H, L, D); mask: bool, broadcastable to (B, H, N, L), True = keep. Returns (B, H, N, D).
    """
    if q.requires_grad and q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= SHORT:
        # On a CPU the backward pass of the fused kernel costs more than two plain products for short sequences, most of
        # all in bfloat16: so a training step of the emoji recipe takes 0.85 of the time.
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, N, L)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], backend: str | None = None
) -> Tensor:
    """Attention of many sequences laid end to end: rows of item i attend to rows of item i only.

    q: (sum(lengths_q), H, D); k, v: (sum(lengths_k), H, D). Returns the shape of q.
    backend: a name from `packed_backends(q)`; None takes the first (the fastest) of them.
    """
    usable = packed_backends(q)
    if backend is None:
        backend = next(iter(usable))
    if backend not in usable:
        raise ValueError(f"Packed attention {backend!r} cannot run on {q.dtype} at {q.device}; usable are "
                         f"{', '.join(usable)}.")
    return usable[backend](q, k, v, list(lengths_q), list(lengths_k))


def packed_backends(q: Tensor) -> dict:
    """The packed variants that can take `q`, fastest first; the last one, per-segment SDPA, takes anything."""
    flash = (q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
             and torch.cuda.get_device_capability(q.device) >= (8, 0))
    usable = {}
    if flash and flash_attn_varlen_func is not None:
        usable["flash_attn"] = _flash_attn
    if flash and varlen_attn is not None:
        usable["varlen"] = _varlen
    if q.is_cuda and memory_efficient_attention is not None:
        usable["xformers"] = _xformers
    usable["segments"] = _segments
    return usable


@lru_cache(maxsize=8)  # every block of a forward pass asks again, and each answer waits for the GPU
def _offsets(lengths: tuple[int, ...], device) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)


def _flash_attn(q, k, v, lengths_q, lengths_k):
    offsets_q, offsets_k = _offsets(tuple(lengths_q), q.device), _offsets(tuple(lengths_k), q.device)
    return flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, max(lengths_q), max(lengths_k))


def _varlen(q, k, v, lengths_q, lengths_k):
    offsets_q, offsets_k = _offsets(tuple(lengths_q), q.device), _offsets(tuple(lengths_k), q.device)
    return varlen_attn(q, k, v, offsets_q, offsets_k, max(lengths_q), max(lengths_k))


def _xformers(q, k, v, lengths_q, lengths_k):
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


def _segments(q, k, v, lengths_q, lengths_k):
    """Runs of items with equal lengths go through one dense call."""
    out, start_q, start_k = [], 0, 0
    for (length_q, length_k), run in groupby(zip(lengths_q, lengths_k, strict=True)):
        S = len(list(run))
        end_q, end_k = start_q + S * length_q, start_k + S * length_k
        # (S*L, H, D) -> (S, H, L, D)
        dense = attention(
            q[start_q:end_q].unflatten(0, (S, length_q)).transpose(1, 2),
            k[start_k:end_k].unflatten(0, (S, length_k)).transpose(1, 2),
            v[start_k:end_k].unflatten(0, (S, length_k)).transpose(1, 2),
        )
        out.append(dense.transpose(1, 2).flatten(0, 1))
        start_q, start_k = end_q, end_k
    return torch.cat(out)
