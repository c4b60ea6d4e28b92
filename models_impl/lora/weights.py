"""The change that a layer of an adapter makes in a weight."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapter import Layer, size_of


@torch.no_grad()
def delta(layer: Layer, shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
    """The change of a weight at strength 1, float32, of shape `shape`.

    shape and weight are those of what the layer changes: only of its rows when it has rows. weight: needed, and used,
    only by an oft, and where there is a dora_scale; the result is on its device. Raises ValueError when the sizes do
    not fit.
    """
    if layer.kind == "oft":
        return _turned(layer, shape, weight)
    t = {name: tensor.to("cpu" if weight is None else weight.device, torch.float32)
         for name, tensor in layer.tensors.items()}
    if layer.kind in ("lora", "dora"):
        change = _product(t["lora_up"], t["lora_down"], t.get("lora_mid"))
    elif layer.kind == "loha":
        change = _rebuilt(t, "hada_w1", "hada_t1") * _rebuilt(t, "hada_w2", "hada_t2")
    elif layer.kind == "lokr":
        w1, w2 = _rebuilt(t, "lokr_w1"), _rebuilt(t, "lokr_w2", "lokr_t2")
        change = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)
    else:
        change = t["diff"]
    if change.shape[0] != shape[0] or change.numel() != math.prod(shape):
        height, width = size_of(layer)
        raise ValueError(f"The LoRA layer of {layer.key} is for {height} x {width}, and the weight is {list(shape)}. "
                         "It was made for another model.")
    change = change.reshape(tuple(shape)) * layer.scale
    if "dora_scale" not in t:
        return change
    if weight is None:
        raise ValueError(f"{layer.key}: a DoRA layer changes a weight by its length, so it needs the weight.")
    magnitude, weight = t["dora_scale"], weight.float()
    whole = weight + change
    per_output = magnitude.shape[0] == whole.shape[0]  # a square weight's (1, in) has 1 here
    dims = tuple(range(1, whole.ndim)) if per_output else (0, *range(2, whole.ndim))
    length = torch.linalg.vector_norm(whole, dim=dims, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return magnitude * whole / length - weight


def turn(blocks: Tensor) -> Tensor:
    """R - I of blocks (K, n, n), R = (I + Q) (I - Q)^-1 with Q = B - B^T, as LyCORIS and ComfyUI have it."""
    q = blocks - blocks.mT
    return 2 * q @ torch.linalg.inv(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - q)


def _turned(layer: Layer, shape: Sequence[int], weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError(f"{layer.key}: an OFT layer turns a weight, so it needs the weight.")
    blocks = layer.tensors["oft_blocks"].to(weight.device, torch.float32)
    if size_of(layer)[0] != shape[0]:
        raise ValueError(f"The OFT layer of {layer.key} is for {size_of(layer)[0]} outputs, and the weight is "
                         f"{list(shape)}. It was made for another model.")
    rows = weight.float().reshape(*blocks.shape[:2], -1)  # (K, n, inputs)
    return layer.scale * (turn(blocks).mT @ rows).reshape(tuple(shape))


def _product(up: Tensor, down: Tensor, mid: Tensor | None) -> Tensor:
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    return _tucker(mid, up.flatten(1).T, down.flatten(1))


def _rebuilt(t: Mapping[str, Tensor], factor: str, tucker: str | None = None) -> Tensor:
    if factor in t:
        return t[factor]
    a, b = t[factor + "_a"], t[factor + "_b"]
    return _tucker(t[tucker], a.flatten(1), b.flatten(1)) if tucker in t else a.flatten(1) @ b.flatten(1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # contiguous: torch.kron cannot take the strides that einsum leaves
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b).contiguous()
