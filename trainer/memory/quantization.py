"""Frozen blocks in 8 or 4 bits a weight: the weights of their linear layers are kept as float8 (e4m3, one scale a row)
or as NF4 (arXiv 2305.14314, by bitsandbytes), and made whole where they are used, in the backward pass once more.
Gradients go through; nothing whole is kept between the two.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.schema import Config

BLOCK = 64  # weights that share a scale, of nf4
FP8 = torch.float8_e4m3fn


def frozen(net: nn.Module, config: Config) -> nn.Module:
    """`net` itself; with memory.base the linear layers of its blocks that do not learn are `FewBits` afterwards."""
    if config.memory.base:
        for blocks in [m for m in net.modules() if isinstance(m, nn.ModuleList)]:
            for module in list(blocks.modules()):
                for name, child in module.named_children():
                    if type(child) is nn.Linear and not any(p.requires_grad for p in child.parameters()):
                        setattr(module, name, FewBits(child, config.memory.base))
    return net


def size(net: nn.Module) -> int:
    """Parameters of a network, as many as they stand for."""
    few = [m for m in net.modules() if isinstance(m, FewBits)]
    return (sum(p.numel() for p in net.parameters()) - sum(p.numel() for m in few for p in m.parameters())
            + sum(m.out_features * m.in_features + (0 if m.bias is None else m.bias.numel()) for m in few))


class FewBits(nn.Module):
    """A linear layer that does not learn. Its `weight` is made anew whenever it is asked for."""

    def __init__(self, layer: nn.Linear, kind: str):
        super().__init__()
        self.out_features, self.in_features, self.kind = layer.out_features, layer.in_features, kind
        self.dtype, self.bias = layer.weight.dtype, layer.bias
        packed, scale, table = (pack8 if kind == "fp8" else pack4)(layer.weight.detach())
        # Parameters that do not learn, and no buffers: those would be saved in every checkpoint.
        self.packed, self.scale, self.table = (
            t if t is None else nn.Parameter(t, requires_grad=False) for t in (packed, scale, table))

    def whole(self, dtype: torch.dtype, packed: Tensor, scale: Tensor, table: Tensor | None) -> Tensor:
        """(out, in)"""
        if self.kind == "fp8":
            return (packed.to(scale.dtype) * scale).to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(absmax=scale, shape=torch.Size((self.out_features, self.in_features)), dtype=dtype,
                           blocksize=BLOCK, code=table, quant_type="nf4")
        return dequantize_4bit(packed, state)

    @property
    def weight(self) -> Tensor:
        return self.whole(self.dtype, self.packed, self.scale, self.table)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        return Product.apply(x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x, self)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: FewBits) -> Tensor:
        # Detached, for the layer's own may be elsewhere by then (`offload`).
        ctx.layer, kept = layer, [None if t is None else t.detach() for t in (layer.packed, layer.scale, layer.table)]
        ctx.save_for_backward(*kept)
        return F.linear(x, layer.whole(x.dtype, *kept), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.whole(grad.dtype, *ctx.saved_tensors), None


def pack8(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    """float8 of each row over its largest value, (out, in), and what a row is to be multiplied with, (out, 1)."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (weight.float() / scale).to(FP8), scale, None


def pack4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two weights a byte, the largest of every 64, and the 16 values that there are."""
    if weight.is_meta:  # --dry-run
        n = weight.numel()
        return (torch.empty(-(-n // 2), 1, dtype=torch.uint8, device="meta"),
                torch.empty(-(-n // BLOCK), device="meta"), torch.empty(16, device="meta"))
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax, state.code
