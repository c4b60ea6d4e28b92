"""LoRAs of another rank, and sums of several: the matrices of one layer at a time, in float64."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adapter import Layer, size_of
from .weights import delta, turn

Choose = Callable[[Tensor], int]
"""Singular values, from the largest -> how many of them are kept."""


def by_ratio(ratio: float) -> Choose:
    """Those above the largest, divided by this. (sv_ratio of networks/resize_lora.py,
    kohya-ss/sd-scripts@063ef10)"""
    return lambda s: int((s > s[0] / ratio).sum())


def by_frobenius(share: float) -> Choose:
    """The fewest that keep this share of the Frobenius norm. (sv_fro of networks/resize_lora.py)"""
    return lambda s: reaching(s.square(), share**2)


def by_sum(share: float) -> Choose:
    """The fewest whose sum is this share of all of them. (sv_cumulative of networks/resize_lora.py)"""
    return lambda s: reaching(s, share)


def reaching(values: Tensor, share: float) -> int:
    return int((values.cumsum(0) < share * values.sum() * (1 - 1e-12)).sum()) + 1


def factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """(up, down) of a LoRA without a core, whose product is its change, in float64."""
    t = layer.tensors
    return t["lora_up"].double().flatten(1) * layer.scale, t["lora_down"].double().flatten(1)


def singular(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a layer's change, a DoRA's before its lengths: (U, S, V^T), of no more values
    than it has ranks. A LoRA's change is never made whole."""
    if layer.kind in ("lora", "dora") and "lora_mid" not in layer.tensors:
        up, down = factors(layer)
        (left, a), (right, b) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
        return left @ u, s, vh @ right.T
    plain = replace(layer, tensors={k: v for k, v in layer.tensors.items() if k != "dora_scale"})
    u, s, vh = torch.linalg.svd(delta(plain, shape_of(layer)).double().flatten(1), full_matrices=False)
    rank = int((s > s[0] * 1e-6).sum()) if s.numel() and s[0] else 1  # what float32 leaves beyond is rounding
    return u[:, :rank], s[:rank], vh[:rank]


def shape_of(layer: Layer) -> tuple[int, ...]:
    """Shape of the weight that a layer changes, as far as the layer shows it."""
    outputs, inputs = size_of(layer)
    if not inputs:
        return (outputs,)
    kernel = next((layer.tensors[part].shape[2:] for part in ("lora_mid", "lora_down", "hada_t1", "lokr_t2", "lokr_w2",
                                                              "diff") if part in layer.tensors), ())
    return (outputs, inputs // math.prod(kernel), *kernel)


def norm(layer: Layer) -> float:
    """Frobenius norm of a layer's change, a DoRA's before its lengths; of an OFT's R - I."""
    if layer.kind == "oft":
        return turn(layer.tensors["oft_blocks"].double()).norm().item()
    return layer.tensors["diff"].double().norm().item() * abs(layer.scale) if layer.kind == "diff" \
        else singular(layer)[1].norm().item()


def resized(layer: Layer, choose: Choose, largest: int | None = None) -> tuple[Layer, float]:
    """(a LoRA of the ranks that are chosen, at least one and at most `largest`; the share of the Frobenius norm that it
    has kept). A DoRA keeps its lengths, a LoHa or LoKr becomes a LoRA; an OFT, which has no rank, stays as it is."""
    if layer.kind in ("diff", "oft"):
        return layer, 1.0
    u, s, vh = singular(layer)
    rank = min(max(choose(s), 1), len(s), largest or len(s))
    root, dtype, shape = s[:rank].sqrt(), next(iter(layer.tensors.values())).dtype, shape_of(layer)
    ones = (1,) * (len(shape) - 2)
    own = {"lora_up": (u[:, :rank] * root).reshape(-1, rank, *ones), "lora_down": (root[:, None] * vh[:rank])
           .reshape(rank, *shape[1:])}
    if "dora_scale" in layer.tensors:
        own["dora_scale"] = layer.tensors["dora_scale"]
    whole = s.norm().item()
    kept = s[:rank].norm().item() / whole if whole else 1.0
    kind = "dora" if "dora_scale" in own else "lora"
    return replace(layer, kind=kind, scale=1.0, tensors={k: v.to(dtype).contiguous() for k, v in own.items()}), kept


def total(layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """One layer that changes a weight as several do, each times its weight: LoRAs are put side by side, which is exact
    and has the sum of their ranks. Raises ValueError for others, which cannot be."""
    first = layers[0]
    if len(layers) == 1 and first.kind not in ("lora", "dora", "oft") and "dora_scale" not in first.tensors:
        return replace(first, scale=first.scale * weights[0])
    if {layer.kind for layer in layers} == {"diff"}:
        parts = [layer.tensors["diff"].double() * (layer.scale * w) for layer, w in zip(layers, weights, strict=True)]
        return replace(first, scale=1.0, tensors={"diff": sum(parts).to(first.tensors["diff"].dtype)})
    if odd := next((layer for layer in layers if layer.kind != "lora" or "lora_mid" in layer.tensors), None):
        kind = "dora" if "dora_scale" in odd.tensors else "lora with a core" if "lora_mid" in odd.tensors else odd.kind
        cure = ("it changes a weight by its length, so merge it into the model (--base)" if kind == "dora" else
                "it turns a weight, so merge it into the model (--base)" if kind == "oft" else
                "bring its file to a LoRA by `lora resize` first")
        raise ValueError(f"{odd.key.rpartition('.')[0]} is a {kind}, which is not put side by side with others: "
                         f"{cure}.")
    ends = [layer.tensors["lora_down"].shape[1:] for layer in layers]
    if any(size_of(layer) != size_of(first) or end != ends[0] for layer, end in zip(layers, ends, strict=True)):
        raise ValueError(f"{first.key.rpartition('.')[0]} is {' and '.join(str(size_of(x)) for x in layers)} in these "
                         "files: they were made for different models.")
    # The scales go evenly into both matrices, so that neither loses digits in half precision.
    ups, downs = [], []
    for layer, weight in zip(layers, weights, strict=True):
        scale = layer.scale * weight
        root = math.sqrt(abs(scale))
        ups.append(layer.tensors["lora_up"].double() * math.copysign(root, scale))
        downs.append(layer.tensors["lora_down"].double() * root)
    dtype = first.tensors["lora_up"].dtype
    for layer in layers[1:]:
        dtype = torch.promote_types(dtype, layer.tensors["lora_up"].dtype)
    own = {"lora_up": torch.cat(ups, 1).to(dtype), "lora_down": torch.cat(downs).to(dtype)}
    return replace(first, tensors=own, scale=1.0)
