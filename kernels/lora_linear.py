"""Linear layer with frozen weights and a LoRA beside it (arXiv 2106.09685, eq. 3), as one step of autograd.

    y = x W^T + bias + scale (x A^T) B^T

x: (..., in); W: (out, in); bias: (out,); A: (rank, in); B: (out, rank); y: (..., out). x, A and B get gradients. Both
products of a pass are added up by the matrix multiplication, so that no other tensor of the size of y, or of x's
gradient, is made, scaled and added. Under autocast everything is multiplied in its dtype, as by F.linear.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .runtime import computed_in


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if torch.compiler.is_compiling():  # which fuses the additions itself
        return lora_linear_reference(x, weight, bias, a, b, scale)
    dtype = computed_in(x)
    # Detached: in the backward pass the layer's own may be elsewhere, where blocks are swapped.
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    return _LoraProduct.apply(x.to(dtype), weight, bias, a.to(dtype), b.to(dtype), scale)  # gradients are cast back


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)  # (N, in)
        with torch.autocast(x.device.type, enabled=False):
            low = rows @ a.T  # (N, rank)
            y = F.linear(rows, weight, bias).addmm_(low, b.T, alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, a, b, low)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, a, b, low = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (N, out)
        with torch.autocast(grad.device.type, enabled=False):
            of_b = (rows.T @ low).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
            low = (rows @ b).mul_(ctx.scale)
            of_a = low.T @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = (rows @ weight).addmm_(low, a).view_as(x)
        return of_x, None, None, of_a, of_b, None
