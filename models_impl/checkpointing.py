"""Activations that are computed again in the backward pass."""
from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, *inputs, checkpointed: bool):
    """block(*inputs). checkpointed: where there are gradients, only the inputs are kept for the backward pass."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
