"""Attention over many sequences laid end to end: rows of item i attend only to rows of item i.

q: (sum(lengths_q), H, D); k, v: (sum(lengths_k), H, D); lengths of the items in order. Behind it FlashAttention's
kernel, torch's or xformers' where they are installed and can take q; else one dense call per run of equal lengths.
"""
from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attention
from .runtime import has_flash_attention, library


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]
) -> Tensor:
    """One dense call for each run of items with equal lengths."""
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


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], backend: str | None = None
) -> Tensor:
    """Returns the shape of q. backend: a name from `packed_backends(q)`; None takes the first (the fastest) of them.

    Raises ValueError for a backend that cannot run.
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
    usable = {}
    if has_flash_attention(q) and library("flash_attn"):
        usable["flash_attn"] = _flash_attn
    if has_flash_attention(q) and library("torch.nn.attention.varlen"):
        usable["varlen"] = _varlen
    if q.is_cuda and library("xformers.ops"):
        usable["xformers"] = _xformers
    usable["segments"] = packed_attention_reference
    return usable


@lru_cache(maxsize=8)  # every block of a forward pass asks again, and each answer waits for the GPU
def _offsets(lengths: tuple[int, ...], device) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)


def _flash_attn(q, k, v, lengths_q, lengths_k):
    offsets_q, offsets_k = _offsets(tuple(lengths_q), q.device), _offsets(tuple(lengths_k), q.device)
    return library("flash_attn").flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, max(lengths_q), max(lengths_k))


def _varlen(q, k, v, lengths_q, lengths_k):
    offsets_q, offsets_k = _offsets(tuple(lengths_q), q.device), _offsets(tuple(lengths_k), q.device)
    varlen_attn = library("torch.nn.attention.varlen").varlen_attn
    return varlen_attn(q, k, v, offsets_q, offsets_k, max(lengths_q), max(lengths_k))


def _xformers(q, k, v, lengths_q, lengths_k):
    ops = library("xformers.ops")
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
