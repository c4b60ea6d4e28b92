"""AdamW, or Muon for the hidden matrices beside AdamW for the rest. The learning rate is a function of the step."""
from __future__ import annotations

import math

import torch

from .config import Optimizer


def rate_at(step: int, steps: int, settings: Optimizer) -> float:
    """The share of the full rate at this step."""
    share = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    start = settings.decay_from * steps
    if settings.decay != "constant" and step >= start:
        progress = (step - start) / max(steps - start, 1)
        share *= 1 - progress if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return share


class Optimizers:
    """One or two torch optimizers behind the few calls that the loop makes."""

    def __init__(self, groups: list[dict], settings: Optimizer, steps: int):
        """groups: {"params": [(name, parameter)], "rate": multiple of the learning rate, "matrices": names for Muon}"""
        self.settings, self.steps, self.parts = settings, steps, []
        adamw, muon = [], []
        for group in groups:
            hidden = [p for n, p in group["params"] if p.ndim == 2 and n in group["matrices"]]
            hidden = hidden if settings.name == "muon" else []
            ids = {id(p) for p in hidden}
            rest = [p for _, p in group["params"] if id(p) not in ids]
            if hidden:
                muon.append({"params": hidden, "lr": settings.muon_rate * group["rate"]})
            if rest:
                adamw.append({"params": rest, "lr": settings.rate * group["rate"]})
        if adamw:
            self.parts.append(torch.optim.AdamW(adamw, betas=tuple(settings.betas), weight_decay=settings.weight_decay))
        if muon:
            self.parts.append(torch.optim.Muon(
                muon, momentum=settings.muon_momentum, weight_decay=settings.weight_decay, adjust_lr_fn="original"))
        self.full = [[g["lr"] for g in part.param_groups] for part in self.parts]

    @property
    def parameters(self):
        return [p for part in self.parts for g in part.param_groups for p in g["params"]]

    def step(self, step: int):
        share = rate_at(step, self.steps, self.settings)
        for part, rates in zip(self.parts, self.full, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)
        return share

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the optimizers remember, flat, for safetensors: part.parameter.name."""
        return {f"{i}.{j}.{name}": value if torch.is_tensor(value) else torch.tensor(value)
                for i, part in enumerate(self.parts)
                for j, state in part.state_dict()["state"].items()
                for name, value in state.items()}

    def load(self, tensors: dict[str, torch.Tensor]):
        for i, part in enumerate(self.parts):
            state = {}
            for key, value in tensors.items():
                which, parameter, name = key.split(".", 2)
                if int(which) == i:
                    state.setdefault(int(parameter), {})[name] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
