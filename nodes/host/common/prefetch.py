"""ComfyUI's fetching of a block's weights before it runs, all at once and beside the computing, in the form that our
networks take."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

try:
    from comfy import model_prefetch
except ImportError:  # ComfyUI 0.3.75
    model_prefetch = None


def host_prefetch(blocks: Iterable[nn.Module], device: torch.device, dynamic: bool) -> Callable:
    """before_block(block) to call with each of `blocks`, in this order, before it runs, and with None after the last;
    then it may begin again.

    dynamic: whether their ModelPatcher is dynamic; only then are there weights to fetch.
    """
    if model_prefetch is None or not dynamic:
        return lambda block: None
    blocks, queue = list(blocks), None

    def before_block(block: nn.Module | None):
        nonlocal queue
        if block is blocks[0]:
            queue = model_prefetch.make_prefetch_queue(list(blocks), device, {"prefetch_dynamic_vbars": True})
        if queue is not None:  # None where this device cannot
            model_prefetch.prefetch_queue_pop(queue, device, block)

    return before_block
