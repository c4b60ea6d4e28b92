"""PixArt-delta's ControlNet-Transformer (arXiv 2401.05252, section 4; pixart_controlnet.py of PixArt-alpha@cac2fd3).

Trainable copies of the first blocks form a stream of their own, which begins at the tokens that leave block 0 of the
base model plus the projected hint. What leaves copy i is projected and added before block i + 1 of the base.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

from torch import Tensor, nn

from .config import PixArtConfig
from .model import PixArt, PixArtBlock, SharedInputs

RELEASED_BLOCKS = 13


class ControlBlock(nn.Module):
    def __init__(self, config: PixArtConfig, index: int, operations, to: dict):
        super().__init__()
        D = config.hidden
        self.copied_block = PixArtBlock(config, index, operations, to)
        if index == 0:
            self.before_proj = operations.Linear(D, D, **to)
        self.after_proj = operations.Linear(D, D, **to)


class PixArtControlNet(nn.ModuleList):
    """Keys: i.copied_block.<key of a block>, i.after_proj, 0.before_proj."""

    def __init__(self, config: PixArtConfig, blocks: int = RELEASED_BLOCKS, operations=nn, dtype=None, device=None):
        if not 1 <= blocks < config.depth:
            raise ValueError(f"A ControlNet of {blocks} blocks does not fit a PixArt of {config.depth}: it has at "
                             f"least 1 and at most {config.depth - 1}.")
        to = dict(dtype=dtype, device=device)
        super().__init__(ControlBlock(config, i, operations, to) for i in range(blocks))
        self.config, self.dtype = config, dtype

    def initialise(self, base: PixArt) -> PixArtControlNet:
        """Copies of `base`'s blocks, which change nothing before the first step of training."""
        for i, block in enumerate(self):
            block.copied_block.load_state_dict(deepcopy(base.blocks[i].state_dict()))
            for linear in (block.after_proj, *([block.before_proj] if i == 0 else [])):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        return self

    def residuals(self, x: Tensor, hint: Tensor, shared: SharedInputs, run: Callable,
                  before_block: Callable[[nn.Module | None], None] = lambda block: None) -> Iterator[Tensor]:
        """See `model.ControlNetwork`."""
        c = x
        for i, block in enumerate(self):
            before_block(block)
            if i == 0:
                c = c + block.before_proj(hint)
            c = run(block.copied_block, c, shared)
            residual = block.after_proj(c)
            if i == len(self) - 1:
                before_block(None)  # the base may not ask for more
            yield residual
