"""The blocks of a network spread over the processes of a run (FSDP2, torch's fully_shard): each process keeps its part
of every block's weights, gradients, moments and EMA, and gathers a block while it is at work. What is no block is
whole in every process. Checkpoints have whole tensors, whatever the number of processes.
"""
from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..config.schema import Config
from ..features.precision import DTYPES
from ..training.optim import Optimizers
from . import sharded
from .ddp import Whole, mean


def spread(recipe: nn.Module, accelerator, gather: torch.dtype = torch.float32):
    """Spreads the blocks of a recipe over the processes. gather: what weights are in a block at work. What enters it
    stays as it is, for autocast decides that, as without FSDP."""
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False) \
        if gather != torch.float32 else MixedPrecisionPolicy()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    some = blocks(recipe)
    parts = {p for block in some for p in block.parameters()}
    for block in some:
        # A block that says nothing of this keeps its weights until the backward pass, if it is called by itself.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # What gathers the next block while one is at work, and knows when the last gradient is there.
    fully_shard(recipe, mesh=mesh, ignored_params={p for p in recipe.parameters() if p not in parts})


def blocks(recipe: nn.Module) -> list[nn.Module]:
    """The innermost members of module lists, but for those of the text encoder and of what a recipe names as `whole`;
    and what such a member is made of, where its parts are called instead of it."""
    apart = {m for name in ("text", *recipe.whole)
             if (some := operator.attrgetter(name)(recipe)) is not None for m in some.modules()}
    members = [block for some in recipe.modules() if isinstance(some, nn.ModuleList) and some not in apart
               for block in some if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    return [part for block in members for part in ([block] if has_forward(block) else block.children())]


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


class Parts(Whole):
    def __init__(self, recipe: nn.Module, config: Config, accelerator):
        super().__init__(recipe, config, accelerator)
        spread(recipe, accelerator, DTYPES[config.memory.gather])

    def start(self, optimizer: Optimizers, rounds: int, pictures: int):
        pass

    def backward(self, batch, rounds: int, last: bool) -> Tensor:
        loss = mean(self.model(batch), batch) / rounds
        loss.backward()
        return loss.detach()

    def update(self, optimizer: Optimizers, step: int) -> tuple[Tensor, float]:
        sharded.join_gradients(optimizer.parameters)
        return super().update(optimizer, step)
