"""What a forward pass keeps for the backward pass, measured on small networks and extrapolated."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def kept_bytes(module: nn.Module, call, bf16: bool) -> int:
    """What `call()`, a forward pass of `module`, keeps for the backward pass on top of the weights."""
    own, seen = {id(s): s for s in (p.untyped_storage() for p in module.parameters())}, {}  # a storage is one object

    def keep(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            seen[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        call()
    return sum(storage.nbytes() for storage in seen.values())


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention that keeps no scores, as on a GPU."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def of_stack(blocks: list[tuple[int, float]], inputs: float, checkpointed: bool) -> float:
    """Bytes that a stack of blocks keeps. blocks: (how many, bytes that one keeps); inputs: bytes of what enters one,
    all that checkpointing keeps until it computes the largest again."""
    if checkpointed:
        return max(size for _, size in blocks) + sum(count for count, _ in blocks) * inputs
    return sum(count * size for count, size in blocks)


def of_network(probe: Callable[[int, int], float], sides: tuple[int, int], tokens: float, depth: int, inputs: float,
               checkpointed: bool, blocks: int = 1) -> float:
    """Bytes that a network keeps of one picture.

    probe(n, side): what one of n times `blocks` blocks keeps of side x side tokens. Linear in both, it is extrapolated
    from both sides, and from one and two, to `depth` blocks and `tokens`. inputs: see `of_stack`.
    """
    small, large = sides

    def at(n: int) -> float:
        few, many = probe(n, small), probe(n, large)
        return few + (many - few) * (tokens - small**2) / (large**2 - small**2)

    one, two = at(1), at(2)
    block = (two - one) / blocks
    return max(one - blocks * block, 0.0) + of_stack([(depth, block)], inputs, checkpointed)


def casts(module: nn.Module, bf16: bool) -> int:
    """Bytes of the copies that autocast makes of the weights that learn, and keeps."""
    return 2 * sum(p.numel() for p in module.parameters() if p.requires_grad) if bf16 else 0
