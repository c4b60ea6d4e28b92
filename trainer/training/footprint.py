"""How much memory a step takes, estimated beforehand. What it takes is in memory/measured.py."""
from __future__ import annotations

import torch

from ..config import rules
from ..config.schema import Config
from ..distributed import deepspeed, fsdp2
from ..memory import offload
from .optim import Optimizers


def estimate(config: Config, recipe, optimizers: Optimizers, pictures: int, processes: int,
             cpu: bool) -> dict[str, float]:
    """Bytes that a process holds in a step, by what they are."""
    learns = [p for p in recipe.parameters() if p.requires_grad]
    count = sum(p.numel() for p in learns)
    weights = sum(p.nbytes for net in (recipe, *recipe.teacher) for p in net.parameters())
    with torch.random.fork_rng(devices=[]):  # of the probes' weights
        activations = recipe.activation_bytes(pictures, cpu)
    sizes = {
        "weights": weights - offload.spared(recipe, config),
        "gradients": max(p.nbytes for p in learns) if config.memory.fused_backward else sum(p.nbytes for p in learns),
        "optimizer": optimizers.state_bytes()
        + max((8 * p.numel() for p in learns if p.dtype == torch.bfloat16), default=0),  # one in float32, and gradient
        "ema": 4 * count if config.ema.decay else 0,
        "activations": activations,
    }
    way = rules.way(config)
    if way == rules.FSDP2:
        blocks = [p for block in fsdp2.blocks(recipe) for p in block.parameters()]
        learning = sum(p.numel() for p in blocks if p.requires_grad)
        elsewhere = {"weights": sum(p.nbytes for p in blocks), "gradients": 4 * learning,
                     "optimizer": optimizers.state_bytes({id(p) for p in blocks}),
                     "ema": 4 * learning if config.ema.decay else 0}
        for name, size in elsewhere.items():
            sizes[name] -= (1 - 1 / processes) * size
    if way == rules.DEEPSPEED:
        gradients, moments = deepspeed.shares(processes)
        sizes["gradients"] *= gradients
        sizes["optimizer"] = moments * (sizes["optimizer"] + 4 * count)  # and a copy of the weights
    return sizes
