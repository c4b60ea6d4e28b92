"""Tensors of which each process has a part (DTensor), and those that are whole in each: gradients and norms of both.

`whole` and `part` serve weights, EMA and moments alike. torch.distributed.checkpoint.state_dict would not take their
place. It knows the weights of modules, and neither an EMA nor DeepSpeed's moments. Of an optimizer it wants parameters
that have names in the module, which Muon's matrices of convolutions have not; and to load one it first takes a step
with zero gradients, which counts in optimizers that keep more than a learning rate for all parameters (Prodigy,
schedule-free).
"""
from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_part(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


@torch.no_grad()
def join_gradients(parameters: list[nn.Parameter]):
    """The mean over the processes, of gradients of what is whole in each; those of blocks have been joined."""
    for p in parameters:
        if p.grad is not None and not isinstance(p, DTensor):
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """torch's clip_grad_norm_ of parameters of both kinds."""
    some = [[p for p in parameters if isinstance(p, DTensor) is kind and p.grad is not None] for kind in (True, False)]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in own])) for own in some if own]
    norm = torch.stack(norms).norm()
    for own in some:
        torch.nn.utils.clip_grads_with_norm_(own, limit, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes, which must all ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is a part."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def local(tensor: Tensor) -> Tensor:
    """The memory behind a parameter, in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
