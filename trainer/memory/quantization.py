"""Frozen blocks in 8 or 4 bits a weight, dequantised where they are used (`kernels/quantized_linear.py`)."""
from __future__ import annotations

from torch import Tensor, nn

from ...kernels.quantized_linear import QuantizedWeight, dequantize, quantize, quantized_linear
from ...kernels.runtime import computed_in
from ..config.schema import Config


def frozen(net: nn.Module, config: Config) -> nn.Module:
    """`net` itself, as memory.base says."""
    return in_few_bits(net, config.memory.base) if config.memory.base else net


def in_few_bits(net: nn.Module, kind: str) -> nn.Module:
    """`net` itself: the linear layers of its blocks that do not learn become `QuantizedLinear`."""
    for blocks in [m for m in net.modules() if isinstance(m, nn.ModuleList)]:
        for module in list(blocks.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear and not any(p.requires_grad for p in child.parameters()):
                    setattr(module, name, QuantizedLinear(child, kind))
    return net


def size(net: nn.Module) -> int:
    """Number of a network's parameters before they were quantised."""
    layers = [m for m in net.modules() if isinstance(m, QuantizedLinear)]
    return (sum(p.numel() for p in net.parameters()) - sum(p.numel() for m in layers for p in m.parameters())
            + sum(m.out_features * m.in_features + (0 if m.bias is None else m.bias.numel()) for m in layers))


class QuantizedLinear(nn.Module):
    """A linear layer that does not learn. Its `weight` is dequantised whenever it is asked for."""

    def __init__(self, layer: nn.Linear, kind: str):
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.dtype, self.bias = layer.weight.dtype, layer.bias
        packed, scale, table, _ = quantize(layer.weight.detach(), kind)
        # Parameters that do not learn, and no buffers: those would be saved in every checkpoint.
        self.packed, self.scale, self.table = (
            t if t is None else nn.Parameter(t, requires_grad=False) for t in (packed, scale, table))

    def quantized(self) -> QuantizedWeight:
        """The weight as it is kept; detached, for the layer's own may be elsewhere in the backward pass (`offload`)."""
        packed, scale, table = (t if t is None else t.detach() for t in (self.packed, self.scale, self.table))
        return QuantizedWeight(packed, scale, table, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """(out, in)"""
        return dequantize(self.quantized(), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(computed_in(x))
        return quantized_linear(x, self.quantized(), None if self.bias is None else self.bias.to(x.dtype))
