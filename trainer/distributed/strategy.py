"""How several processes train together, with the same recipe: each with a whole network (DDP), each with a part of the
blocks (FSDP2), or each with a part of gradients and moments (DeepSpeed's ZeRO). In all three the gradients are those of
one process, and checkpoints have whole tensors. Which one is chosen is in config/rules.py.
"""
from __future__ import annotations

from torch import nn

from ..config.rules import DDP, DEEPSPEED, FSDP2, way
from ..config.schema import Config
from .ddp import Whole
from .deepspeed import Zero
from .fsdp2 import Parts

IN_WORDS = {DDP: "each with a whole network (DDP)", FSDP2: "each with a part of the blocks (FSDP2)",
            DEEPSPEED: "each with a part of gradients and moments (DeepSpeed)"}


def of(recipe: nn.Module, config: Config, accelerator) -> Whole:
    """What the processes of a recipe do together. To be made before the optimizer, and started after it."""
    chosen = way(config)
    if chosen == FSDP2 and accelerator.num_processes == 1:
        chosen = DDP
    return {DDP: Whole, FSDP2: Parts, DEEPSPEED: Zero}[chosen](recipe, config, accelerator)
