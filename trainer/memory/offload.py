"""Blocks that do not learn, kept in host memory: each comes to the device for its forward pass and again for its
backward pass, where activations are computed anew, and while it is at work the next one is on its way.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import libraries
from ..config.schema import Config


def swapped(recipe: nn.Module, config: Config) -> list[nn.Module]:
    """The last of the blocks that mostly stay as they are. Raises ValueError where they are fewer than asked for."""
    lists = [m for m in recipe.modules() if isinstance(m, nn.ModuleList)]
    blocks = [b for some in lists for b in some if not isinstance(b, nn.ModuleList) and len(still(b))
              and 2 * sum(p.numel() for p in still(b)) > sum(p.numel() for p in b.parameters())]
    if config.memory.swap_blocks > len(blocks):
        raise ValueError(f"memory.swap_blocks={config.memory.swap_blocks}: there are {len(blocks)} blocks that do not "
                         "learn.")
    return blocks[len(blocks) - config.memory.swap_blocks:]


def still(block: nn.Module) -> list[nn.Parameter]:
    return [p for p in block.parameters() if not p.requires_grad]


def spared(recipe: nn.Module, config: Config) -> int:
    """Bytes that are not on the device: two blocks are at a time."""
    sizes = sorted(sum(p.nbytes for p in still(block)) for block in swapped(recipe, config))
    return sum(sizes[:-2])


def place(recipe: nn.Module, config: Config, device: torch.device) -> Swap | None:
    """Moves a recipe to the device, but for the blocks that are to stay in host memory."""
    if not config.memory.swap_blocks:
        recipe.to(device)
        return None
    blocks = swapped(recipe, config)
    staying = {id(p) for block in blocks for p in still(block)}
    for module in recipe.modules():
        for p in module.parameters(recurse=False):
            if id(p) not in staying:
                p.data = p.data.to(device)
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, value.to(device))
    libraries.hide_from_ddp(recipe, [name for name, p in recipe.named_parameters() if id(p) in staying])
    return Swap(blocks, device)


class Swap:
    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parameters = [still(block) for block in blocks]
        self.host = [[p.data.pin_memory() if self.stream else p.data for p in some] for some in self.parameters]
        self.here: dict[int, tuple[list[Tensor], object]] = {}
        for i, block in enumerate(blocks):
            self.leave(i)
            block.register_forward_pre_hook(lambda *_, i=i: self.enter(i))
            block.register_forward_hook(lambda *_, i=i: self.leave(i), always_call=True)

    def fetch(self, i: int):
        """Begins to copy a block, beside what the device is doing."""
        if i in self.here or not 0 <= i < len(self.host):
            return
        if self.stream is None:
            self.here[i] = [tensor.to(self.device, copy=True) for tensor in self.host[i]], None
            return
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in self.host[i]]
            self.here[i] = copies, self.stream.record_event()

    def enter(self, i: int):
        following = i - 1 if libraries.in_backward() else i + 1
        self.fetch(i)
        copies, done = self.here[i]
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        for p, copy in zip(self.parameters[i], copies, strict=True):
            if self.stream:  # its memory is not to be given away while the computation may read it
                copy.record_stream(torch.cuda.current_stream(self.device))
            p.data = copy
        for other in [k for k in self.here if k not in (i, following)]:  # fetched for nothing
            del self.here[other]
        self.fetch(following)

    def leave(self, i: int):
        """What the backward pass needs of a block it holds itself until then."""
        self.here.pop(i, None)
        for p, tensor in zip(self.parameters[i], self.host[i], strict=True):
            p.data = self.rest(tensor)

    def rest(self, tensor: Tensor) -> Tensor:
        """What a parameter is while it is not used."""
        return tensor
