"""Exponential moving average of the weights that are trained (PixelFlow: 0.9999, on parameters, every step)."""
from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..distributed import sharded


class EmaWeights:
    def __init__(self, module: nn.Module, decay: float, warm_up: bool = False):
        self.decay, self.warm_up = decay, warm_up
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self.live.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int):
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
            get_ema_multi_avg_fn(decay)([sharded.local(a) for a in self.weights.values()],
                                        [sharded.local(p.detach()) for p in self.live.values()], None)

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
