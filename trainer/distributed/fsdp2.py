"""The blocks of a network spread over the processes of a run (FSDP2, torch's fully_shard): each process keeps its part
of every block's weights, gradients, moments and average, and gathers a block while it is at work. What is no block is
whole in every process. Checkpoints have whole tensors, whatever the number of processes.
"""
from __future__ import annotations

import operator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import Config


def problems(config: Config, told: str) -> list[str]:
    """told: what asks for it."""
    if config.optimizer.name == "adamw":
        return []
    return [f"{told} goes with optimizer.name='adamw', not {config.optimizer.name!r}, which looks at whole matrices."]


def spread(recipe: nn.Module, accelerator):
    """Spreads the blocks of a recipe over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    some = blocks(recipe)
    parts = {p for block in some for p in block.parameters()}
    for block in some:
        # A block that says nothing of this keeps its weights until the backward pass, if it is called by itself.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # What gathers the next block while one is at work, and tells when the last gradient is there.
    fully_shard(recipe, mesh=mesh, ignored_params={p for p in recipe.parameters() if p not in parts})


def blocks(recipe: nn.Module) -> list[nn.Module]:
    """The innermost members of module lists, but for those of the text encoder and of what a recipe names as `whole`;
    and what such a member is made of, where its parts are called instead of it."""
    apart = {m for name in ("text", *getattr(recipe, "whole", ()))
             if (some := operator.attrgetter(name)(recipe)) is not None for m in some.modules()}
    members = [block for some in recipe.modules() if isinstance(some, nn.ModuleList) and some not in apart
               for block in some if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    return [part for block in members for part in ([block] if has_forward(block) else block.children())]


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


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
    """Of a part, gathered from all processes, which must all ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, this process's, where `like` is a part."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def local(tensor: Tensor) -> Tensor:
    """The memory behind a parameter, in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
