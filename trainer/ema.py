"""A moving average of the weights that are trained (PixelFlow: 0.9999, on parameters, every step)."""
from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    def __init__(self, module: nn.Module, decay: float, warm_up: bool = False):
        self.decay, self.warm_up = decay, warm_up
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int):
        if self.average:
            decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.live.values()], 1 - decay)

    @contextmanager
    def applied(self):
        """Inside, the module carries the average; outside, it never did."""
        for name, value in self.average.items():
            self.live[name].data, self.average[name] = value, self.live[name].data
        try:
            yield
        finally:
            for name, value in self.average.items():
                self.live[name].data, self.average[name] = value, self.live[name].data

    def state_dict(self):
        return self.average

    @torch.no_grad()
    def load_state_dict(self, tensors):
        for name, value in self.average.items():
            value.copy_(tensors[name])
