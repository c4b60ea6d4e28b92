"""Linear layer whose weight is kept in few bits and dequantised where it is used, in the backward pass once more.

    y = x W^T + bias        fp8   W = packed * scale, float8 (e4m3) with one scale a row
                            int8  the same of whole numbers from -127 to 127: for devices without float8, as Apple's
                            nf4   W[i] = table[code i] * scale[i // 64], 4 bits a weight (arXiv 2305.14314, section 3)

x: (..., in); W: (out, in); bias: (out,); y: (..., out) in x.dtype. Only x gets a gradient, and nothing dequantised is
kept between the two passes. Behind nf4 bitsandbytes: its product, the one of its Linear4bit, on CUDA.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .runtime import bitsandbytes, library

BLOCK = 64  # weights that share a scale, of nf4
FP8 = torch.float8_e4m3fn


class QuantizedWeight(NamedTuple):
    packed: Tensor
    """fp8: (out, in) float8; int8: (out, in) int8; nf4: (ceil(out * in / 2), 1) uint8, the first of two weights in the
    upper four bits."""
    scale: Tensor
    """float32; fp8 and int8: (out, 1); nf4: (ceil(out * in / 64),)."""
    table: Tensor | None
    """nf4: the 16 values that there are, (16,) float32; None otherwise."""
    shape: tuple[int, int]
    """(out, in)"""


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """weight: (out, in); kind: fp8, int8, or nf4, which needs bitsandbytes."""
    shape = tuple(weight.shape)
    if kind in ("fp8", "int8"):
        whole, largest = kind == "int8", 127 if kind == "int8" else torch.finfo(FP8).max
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        scaled = weight.float() / scale
        return QuantizedWeight(scaled.round().to(torch.int8) if whole else scaled.to(FP8), scale, None, shape)
    if weight.is_meta:  # bitsandbytes' kernel wants values
        sizes = (-(-weight.numel() // 2), 1), (-(-weight.numel() // BLOCK),), (16,)
        dtypes = torch.uint8, torch.float32, torch.float32
        return QuantizedWeight(*(torch.empty(n, dtype=d, device="meta") for n, d in zip(sizes, dtypes, strict=True)),
                               shape)
    functional = library("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return QuantizedWeight(packed, state.absmax, state.code, shape)


def dequantize_reference(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    if weight.table is None:
        return (weight.packed.to(weight.scale.dtype) * weight.scale).to(dtype)
    return dequantize_4bit(weight.packed, weight.scale, weight.table, weight.shape, BLOCK).to(dtype)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """(out, in) of this dtype."""
    functional = None if weight.table is None else library("bitsandbytes.functional")
    # On a CPU bitsandbytes (0.50) takes each row to begin a block: where that is not so, its weights are wrong.
    if functional is None or (weight.packed.device.type == "cpu" and weight.shape[1] % BLOCK):
        return dequantize_reference(weight, dtype)
    return functional.dequantize_4bit(weight.packed, _state(functional, weight, dtype))


def quantized_linear_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    packed, scale, table, shape = weight
    return _Product.apply(x, bias, shape, packed, scale, table)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    package = None if weight.table is None else bitsandbytes(x)
    if package is None:
        return quantized_linear_reference(x, weight, bias)
    return package.matmul_4bit(x, weight.packed.t(), _state(package.functional, weight, x.dtype), bias=bias)


def dequantize_4bit(packed: Tensor, scale: Tensor, table: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """The weight in float32 from one of 16 values for each and a scale for every `block`, rows one after the other."""
    values = table.float()[nibbles(packed.flatten()).flatten().long()]
    values = values * scale.float().repeat_interleave(block)[: len(values)]
    return values[: torch.Size(shape).numel()].reshape(shape)


def nibbles(packed: Tensor) -> Tensor:
    """(..., n) bytes -> (..., n, 2) uint8, the upper four bits first."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed >> 4, packed & 15], dim=-1)


def _state(functional, weight: QuantizedWeight, dtype: torch.dtype):
    """bitsandbytes' description of a weight."""
    return functional.QuantState(absmax=weight.scale, shape=torch.Size(weight.shape), dtype=dtype, blocksize=BLOCK,
                                 code=weight.table, quant_type="nf4")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *parts: Tensor | None) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*parts)
        return F.linear(x, dequantize(QuantizedWeight(*parts, shape), x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight = QuantizedWeight(*ctx.saved_tensors, ctx.shape)
        return grad @ dequantize(weight, grad.dtype), None, None, None, None, None
