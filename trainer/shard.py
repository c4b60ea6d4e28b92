"""The blocks of a network spread over the processes of a run (FSDP2, torch's fully_shard): each process keeps its part
of every block's weights, gradients, moments and average, and gathers a block while it is at work. What is no block is
whole in every process. Checkpoints have whole tensors, whatever the number of processes.
"""
from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import Config

RECIPES = "pixart", "pixart_lora", "pixelflow"
"""Those whose blocks are called as they are, and which were tried."""


def problems(config: Config) -> list[str]:
    if not config.memory.shard:
        return []
    found = []
    if config.recipe.name not in RECIPES:
        found.append(f"memory.shard=true is for recipe.name = {', '.join(RECIPES)}, not {config.recipe.name!r}: leave "
                     "it out, and each process keeps a whole network.")
    if config.optimizer.name != "adamw":
        found.append(f"memory.shard=true goes with optimizer.name='adamw', not {config.optimizer.name!r}, which looks "
                     "at whole matrices.")
    for name, value in (("compile", config.compile), ("memory.base", config.memory.base),
                        ("memory.swap_blocks", config.memory.swap_blocks)):
        if value:
            found.append(f"memory.shard=true does not go with {name}={value!r}: leave one of them out.")
    return found


def spread(recipe: nn.Module, config: Config, accelerator) -> bool:
    """Spreads the blocks of a recipe, but of its text encoder, if it is to be and there are several processes. Raises
    ValueError where accelerate was told to do it in its own way."""
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"accelerate was told to use {kind}, which this trainer does not: launch plainly (torchrun, "
                         "or accelerate launch --multi_gpu), and set memory.shard=true to spread the weights.")
    if not config.memory.shard or accelerator.num_processes == 1:
        return False
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks(recipe):
        fully_shard(block, mesh=mesh)
    return True


def blocks(recipe: nn.Module) -> list[nn.Module]:
    small = set(recipe.text.modules()) if recipe.text is not None else set()
    return [block for some in recipe.modules() if isinstance(some, nn.ModuleList) and some not in small
            for block in some]


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
