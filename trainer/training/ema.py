"""Exponential moving average of the weights that are trained (PixelFlow: 0.9999, on parameters, every step)."""
from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..distributed import sharded


def in_float32(x: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """An average of bf16 numbers is none: what a step adds to it is less than their rounding."""
    return x.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype, copy=copy)


class EmaWeights:
    def __init__(self, module: nn.Module, decay: float, warm_up: bool = False):
        self.decay, self.warm_up = decay, warm_up
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: in_float32(p.detach(), copy=True) for name, p in self.live.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int):
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
            same = [name for name, p in self.live.items() if p.dtype != torch.bfloat16]
            get_ema_multi_avg_fn(decay)([sharded.local(self.weights[name]) for name in same],
                                        [sharded.local(self.live[name].detach()) for name in same], None)
            for name in self.live.keys() - set(same):
                self.weights[name].lerp_(self.live[name].float(), 1 - decay)

    @contextmanager
    def applied(self):
        """Inside, the module carries the averaged weights; outside, it never did."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for name, value in self.weights.items():
            live = self.live[name]
            if sharded.is_part(live):  # whose memory is known to what gathers it
                here, there = sharded.local(live), sharded.local(value)
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)
            else:
                live.data, self.weights[name] = value, live.data

    def state_dict(self):
        return {name: sharded.whole(value) for name, value in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors):
        for name, value in self.weights.items():
            sharded.local(value).copy_(sharded.local(sharded.part(tensors[name], value)))
