"""How several processes train together, with the same recipe: each with a whole network (DDP), each with a part of the
blocks (FSDP2, shard.py), or each with a part of gradients and moments (DeepSpeed's ZeRO, zero.py). In all three the
gradients are those of one process, and checkpoints have whole tensors.
"""
from __future__ import annotations

import os
from contextlib import nullcontext

from torch import Tensor, nn

from ..config import Config
from ..training.optim import Optimizers
from . import deepspeed, fsdp2

DDP, FSDP2, DEEPSPEED = "ddp", "fsdp2", "deepspeed"


def told(name: str) -> bool:
    """Whether accelerate's launcher was told so."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"


SAID = {DDP: "each with a whole network (DDP)", FSDP2: "each with a part of the blocks (FSDP2)",
        DEEPSPEED: "each with a part of gradients and moments (DeepSpeed)"}


def way(config: Config) -> str:
    if told("DEEPSPEED"):
        return DEEPSPEED
    return FSDP2 if config.memory.shard or told("FSDP") else DDP


def problems(config: Config) -> list[str]:
    found, chosen = [], way(config)
    if told("MEGATRON_LM"):
        found.append("accelerate was told to use Megatron-LM, which is for language models: launch without it.")
    if chosen == DEEPSPEED:
        said = "DeepSpeed"
        found += deepspeed.problems(config)
        if config.memory.shard:
            found.append("memory.shard=true is FSDP2, and accelerate was told to use DeepSpeed: leave one of them out.")
    if chosen == FSDP2:
        said = "memory.shard=true" if config.memory.shard else "accelerate's FSDP"
        found += fsdp2.problems(config, said)
        if told("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
            found.append("accelerate was told to use FSDP 1, and this trainer shards by FSDP2: launch with "
                         "--fsdp_version 2 (fsdp_version: 2 in accelerate's file).")
    if chosen != DDP:
        found += [f"{said} does not go with {name}={value!r}: leave one of them out."
                  for name, value in (("compile", config.compile), ("memory.base", config.memory.base),
                                      ("memory.swap_blocks", config.memory.swap_blocks)) if value]
        if getattr(config.recipe, "choices", 1) > 1:
            found.append(f"{said} needs recipe.choices=1: all processes must go the same way through the network.")
    return found


def of(recipe: nn.Module, config: Config, accelerator) -> Whole:
    """What the processes of a recipe do together. To be made before the optimizer, and started after it."""
    chosen = way(config)
    if chosen == FSDP2 and accelerator.num_processes == 1:
        chosen = DDP
    return {DDP: Whole, FSDP2: Parts, DEEPSPEED: Zero}[chosen](recipe, config, accelerator)


class Whole:
    """Each process has a whole network; gradients are joined by accelerate. Also one process alone."""

    def __init__(self, recipe: nn.Module, config: Config, accelerator):
        self.recipe, self.config, self.accelerator = recipe, config, accelerator
        self.model = recipe

    def start(self, optimizer: Optimizers, rounds: int, pictures: int):
        """When weights and moments are where the run goes on. rounds: batches a step; pictures: in each of them."""
        placed = bool(self.config.memory.swap_blocks)  # by `swap`
        self.model = self.accelerator.prepare(self.recipe, device_placement=[not placed])

    def backward(self, batch, rounds: int, last: bool) -> Tensor:
        """The part of the loss that a batch has, whose gradients are added; those of all processes meet in the last."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss = self.model(batch).mean() / rounds
            self.accelerator.backward(loss)
        return loss.detach()

    def update(self, optimizer: Optimizers, step: int) -> tuple[Tensor, float]:
        """(norm of the gradients, share of the rate). Raises FloatingPointError, before anything has changed, where
        the norm is not finite."""
        norm = optimizer.clip()
        finite(norm, step, self.config)
        return norm, optimizer.step(step)


class Parts(Whole):
    def __init__(self, recipe: nn.Module, config: Config, accelerator):
        super().__init__(recipe, config, accelerator)
        fsdp2.spread(recipe, accelerator)

    def start(self, optimizer: Optimizers, rounds: int, pictures: int):
        pass

    def backward(self, batch, rounds: int, last: bool) -> Tensor:
        loss = self.model(batch).mean() / rounds
        loss.backward()
        return loss.detach()

    def update(self, optimizer: Optimizers, step: int) -> tuple[Tensor, float]:
        fsdp2.join_gradients(optimizer.parameters)
        return super().update(optimizer, step)


class Zero(Whole):
    def start(self, optimizer: Optimizers, rounds: int, pictures: int):
        self.model = deepspeed.engine(self.recipe, optimizer, self.config, rounds, pictures,
                                      self.accelerator.num_processes)

    def backward(self, batch, rounds: int, last: bool) -> Tensor:
        self.model.set_gradient_accumulation_boundary(last)
        loss = self.model(batch).mean() / rounds
        self.model.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def update(self, optimizer: Optimizers, step: int) -> tuple[Tensor, float]:
        """As `Whole`'s, but the weights have changed when the norm is known: the checkpoints have not."""
        share = optimizer.step(step)  # which clips too
        norm = deepspeed.norm(self.model)
        finite(norm, step, self.config)
        return norm, share


def finite(norm: Tensor, step: int, config: Config):
    if not norm.isfinite():
        raise FloatingPointError(f"step {step}: the gradient norm is {norm.item()}. Lower optimizer.rate="
                                 f"{config.optimizer.rate} or raise optimizer.warm_up={config.optimizer.warm_up}.")
