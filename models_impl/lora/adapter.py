"""The layers of an adapter file, and the parameters of our networks that they change."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The parameter of our network that a module's name stands for."""

    key: str
    """The parameter, such as blocks.0.attn.qkv.weight."""
    rows: tuple[int, int] | None = None
    """(start, length) along dim 0 where the module is a part of the parameter; None for all of it."""
    shape: tuple[int, ...] | None = None
    """Shape of these rows in the parameter; None when there is no network to check against."""


Names = Mapping[str, Mapping[str, Target]]
"""Spelling ("original", "diffusers") -> module name, with dots -> target."""


@dataclass(frozen=True)
class Layer:
    """One adapter. Tensors are as the file has them, under LyCORIS' names: lora_up, lora_down, lora_mid, hada_w1_a,
    lokr_w1, diff and so on; a dora_scale broadcasts against the weight: (out, 1, ...) or (1, in, ...)."""

    key: str
    rows: tuple[int, int] | None
    kind: str
    """lora, dora, loha, lokr, oft or diff. A loha or lokr may have a dora_scale too."""
    tensors: dict[str, Tensor]
    scale: float


@dataclass(frozen=True)
class Lora:
    layers: list[Layer]
    notes: list[str]
    """The report, in sentences: spelling, kinds, and where each scale comes from."""
    unmatched: list[str]
    """Keys that were not used, with the reason where it is known."""
    text_encoder: list[str] = field(default_factory=list)
    """Keys that change the text encoder, which this network is not."""


def names_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Target]]:
    """The table of a network whose modules other programs call as we do: each weight's module, in both spellings."""
    own = {key.removesuffix(".weight"): Target(key, None, tuple(shape))
           for key, shape in shapes.items() if key.endswith(".weight")}
    return {"original": own, "diffusers": own}


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """Rank of a module's adapter; None for an oft and a lokr of two whole factors, which have none."""
    for part in ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return parts[part].shape[0]
    return None


def kind_of(parts: Mapping[str, object]) -> str | None:
    def whole(factor):
        return factor in parts or {factor + "_a", factor + "_b"} <= parts.keys()

    if {"lora_up", "lora_down"} <= parts.keys():
        return "dora" if parts.keys() & {"dora_scale", "lora_magnitude_vector"} else "lora"
    if whole("hada_w1") and whole("hada_w2"):
        return "loha"
    if whole("lokr_w1") and whole("lokr_w2"):
        return "lokr"
    return "oft" if "oft_blocks" in parts else "diff" if "diff" in parts else None


def size_of(layer: Layer) -> tuple[int, int]:
    """(outputs, inputs times kernel) of the matrix that a layer changes; 0 inputs of an oft, which takes any."""
    t = layer.tensors

    def kernel(part):
        return math.prod(t[part].shape[2:]) if part in t else 1

    def factor(name, tucker=None):
        if name in t:
            return t[name].shape[0], t[name][0].numel()
        if tucker in t:
            return t[name + "_a"].shape[1], t[name + "_b"][0].numel() * kernel(tucker)
        return t[name + "_a"].shape[0], t[name + "_b"][0].numel()

    if layer.kind in ("lora", "dora"):
        return t["lora_up"].shape[0], t["lora_down"][0].numel() * kernel("lora_mid")
    if layer.kind == "loha":
        return factor("hada_w1", "hada_t1")
    if layer.kind == "lokr":
        (out1, in1), (out2, in2) = factor("lokr_w1"), factor("lokr_w2", "lokr_t2")
        return out1 * out2, in1 * in2
    if layer.kind == "oft":
        return math.prod(t["oft_blocks"].shape[:2]), 0
    return t["diff"].shape[0], t["diff"][0].numel()
