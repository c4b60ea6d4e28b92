"""Weights that learn in bf16. Updates are made in float32 and rounded at random, up or down in proportion to what is
nearer (stochastic rounding, arXiv 2010.06192): small ones count on average, where rounding to the nearest loses all of
them.

torch has no such rounding, and pytorch_optimizer's (copy_stochastic) takes the numbers of torch's global generator,
which the backward pass is at work with when weights are updated during it.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config.schema import Config


def lowered(recipe: nn.Module, config: Config) -> nn.Module:
    """`recipe` itself; with memory.weights the matrices and kernels that learn become bf16. Norms, biases and bare
    parameters, which autocast leaves in float32, stay so."""
    if config.memory.weights:
        for module in recipe.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad:
                module.weight.data = module.weight.data.to(torch.bfloat16)
    return recipe


def rounded(x: Tensor, rng: torch.Generator) -> Tensor:
    """float32 -> bf16, one of its two neighbours by the numbers of `rng`."""
    below = torch.randint(1 << 16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + below) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Rounded:
    """A torch optimizer of one bf16 parameter. It trains a stand-in in float32, which has memory only in a step."""

    def __init__(self, p: nn.Parameter, make: Callable[[nn.Parameter], torch.optim.Optimizer]):
        self.p, self.stand_in = p, nn.Parameter(p.detach().float())
        self.inner = make(self.stand_in)
        self.stand_in.data = self.nothing(p)
        self.rng = torch.Generator(p.device if p.device.type != "meta" else "cpu")

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    @property
    def state(self) -> dict:
        return self.inner.state

    def state_dict(self) -> dict:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict):
        self.inner.load_state_dict(state)

    @staticmethod
    def nothing(p: nn.Parameter) -> Tensor:
        return torch.zeros((), device=p.device).expand(p.shape)

    @torch.no_grad()
    def step(self, seed: int):
        """seed: what alone the rounding depends on."""
        if self.p.grad is None:
            return
        self.stand_in.data, self.stand_in.grad = self.p.float(), self.p.grad.float()
        self.inner.step()
        self.p.copy_(rounded(self.stand_in.data, self.rng.manual_seed(seed)))
        self.stand_in.data, self.stand_in.grad = self.nothing(self.p), None

    def zero_grad(self, set_to_none: bool = True):
        self.p.grad = None
