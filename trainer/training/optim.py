"""AdamW (in 8 bits by bitsandbytes), CAME, or Muon for hidden matrices and convolutions beside AdamW for the rest, at
rates that are functions of the step."""
from __future__ import annotations

import math

import torch

from ..config.schema import Optimizer
from ..distributed import sharded
from ..libraries import QUANT_STATE
from .groups import Group

SCALED_BATCH = 256  # the batch that scaled learning rates are given for
SMALL_8BIT = 4096  # numbers; bitsandbytes keeps the moments of smaller parameters in 32 bits


def learning_rate_share(step: int, steps: int, settings: Optimizer) -> float:
    """The share of the full learning rate at this step: up from zero, and from `decay_from` down to `decay_to`."""
    share = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    start = settings.decay_from * steps
    if settings.decay != "constant" and step >= start:
        height = SHAPES[settings.decay](step - start, max(steps - start, 1), settings.decay_cycles)
        share *= settings.decay_to + (1 - settings.decay_to) * height
    return share


SHAPES = {
    "linear": lambda t, T, _: 1 - t / T,
    "cosine": lambda t, T, _: 0.5 * (1 + math.cos(math.pi * (t / T))),
    # SGDR (arXiv 1608.03983), equation 5 with cycles of equal length.
    "cosine_restarts": lambda t, T, cycles: 0.5 * (1 + math.cos(math.pi * (cycles * t / T % 1))),
    # REX (arXiv 2107.04197), section 3: the learning rate stays high for longer than a line's, and then falls.
    "rex": lambda t, T, _: (1 - t / T) / (0.5 + 0.5 * (1 - t / T)),
}
"""decay -> the height, from 1 down to 0, after t of T steps."""


def scaled_learning_rate(settings: Optimizer, batch_size: int) -> float:
    """The full learning rate for this batch (diffusion/utils/optimizer.py of PixArt-sigma@1ce521a, auto_scale_lr)."""
    share = batch_size / SCALED_BATCH
    return settings.learning_rate * {"none": 1.0, "sqrt": share**0.5, "linear": share}[settings.learning_rate_scaling]


def adamw_of(settings: Optimizer) -> type[torch.optim.Optimizer]:
    if settings.name != "adamw8bit":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def moment_bytes(part: torch.optim.Optimizer) -> float:
    """Bytes of an optimizer's state, estimated."""
    def of(p):
        if type(part).__name__ == "AdamW8bit" and p.numel() >= SMALL_8BIT:
            return p.numel() * 2 * (1 + 4 / 256)  # and a scale for each 256
        return p.numel() * (4 if isinstance(part, (Came, torch.optim.Muon)) else 8)

    return sum(of(p) for group in part.param_groups for p in group["params"])


class Came(torch.optim.Optimizer):
    """Confidence-guided Adaptive Memory Efficient Optimization (arXiv 2307.02047, algorithm 2).

    Adafactor's second moment, a row and a column for a matrix, and a first moment whose entries count less where the
    updates around them are unsteady. Convolutions are factored over their last two dimensions, as the release's.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip: float = 1.0,
                 weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=tuple(eps), clip=clip, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
            for p in (p for p in group["params"] if p.grad is not None):
                grad, state, factored = p.grad.float(), self.state[p], p.ndim >= 2
                if not state:
                    state["mean"] = torch.zeros_like(grad)
                    for name in ("square", "doubt") if factored else ("square",):
                        shapes = (grad.shape[:-1], (*grad.shape[:-2], grad.shape[-1])) if factored else (grad.shape,)
                        for part, shape in zip(("row", "column"), shapes, strict=False):
                            state[f"{name}_{part}"] = torch.zeros(shape, device=p.device)
                update = grad * _inverse_root(state, "square", grad.square() + eps1, beta2, factored)
                update /= (update.square().mean().sqrt() / group["clip"]).clamp(min=1.0)
                state["mean"].lerp_(update, 1 - beta1)
                change = state["mean"]
                if factored:
                    doubt = (update - change).square() + eps2
                    change = change * _inverse_root(state, "doubt", doubt, beta3, factored)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(change, alpha=-group["lr"])


def _inverse_root(state: dict, name: str, value: torch.Tensor, beta: float, factored: bool) -> torch.Tensor:
    """1 / sqrt of the moving average of `value`, of which a matrix keeps only the means of rows and columns."""
    row = state[f"{name}_row"].lerp_(value.mean(-1) if factored else value, 1 - beta)
    if not factored:
        return row.rsqrt()
    column = state[f"{name}_column"].lerp_(value.mean(-2), 1 - beta)
    return (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :]


def is_matrix(p: torch.Tensor) -> bool:
    """Or the kernel of a convolution, but not of a depthwise one, whose channels know nothing of each other."""
    return p.ndim == 2 or (p.ndim == 4 and p.shape[1] > 1)


class Muon(torch.optim.Muon):
    """torch's, which takes only matrices, for the kernels of convolutions too: each is one of (out, in * h * w), as in
    Muon's own code (KellerJordan/Muon, muon.py)."""

    def __init__(self, groups: list[dict], **settings):
        self.kernels = []  # (the matrix that is trained in its place, kernel)
        super().__init__([{**group, "params": [self._matrix(p) for p in group["params"]]} for group in groups],
                         **settings)

    def _matrix(self, p: torch.Tensor) -> torch.Tensor:
        if p.ndim == 2:
            return p
        matrix = torch.nn.Parameter(p.detach().flatten(1).contiguous())
        self.kernels.append((matrix, p))
        return matrix

    @torch.no_grad()
    def step(self):
        for matrix, p in self.kernels:
            matrix.copy_(p.flatten(1))
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        super().step()
        for matrix, p in self.kernels:
            p.copy_(matrix.view_as(p))

    def zero_grad(self, set_to_none: bool = True):
        super().zero_grad(set_to_none)
        for _, p in self.kernels:
            p.grad = None


class Optimizers:
    """One or two torch optimizers behind the few calls that the loop makes."""

    def __init__(self, groups: list[Group], settings: Optimizer, steps: int, batch_size: int = 0):
        self.settings, self.steps, self.parts = settings, steps, []
        self.learning_rate = scaled_learning_rate(settings, batch_size)
        adamw, muon, self.clipped = [], [], {}
        for group in groups:
            self.clipped.setdefault(group.clipped, []).extend(p for _, p in group.params)
            hidden = [p for n, p in group.params if n in group.matrices and is_matrix(p)]
            hidden = hidden if settings.name == "muon" else []
            ids = {id(p) for p in hidden}
            rest = [p for _, p in group.params if id(p) not in ids]
            if hidden:
                muon.append({"params": hidden, "lr": settings.muon_learning_rate * group.multiple})
            if rest:
                adamw.append({"params": rest, "lr": self.learning_rate * group.multiple})
        self.parameters = [p for some in self.clipped.values() for p in some]
        if adamw and settings.name == "came":
            self.parts.append(Came(adamw, self.learning_rate, settings.betas or (0.9, 0.999, 0.9999),
                                   weight_decay=settings.weight_decay))
        elif adamw:
            # What is spread over processes and what is not are not taken together.
            apart = {"foreach": False} if any(sharded.is_part(p) for p in self.parameters) else {}
            betas = tuple(settings.betas or (0.9, 0.999))
            self.parts.append(adamw_of(settings)(adamw, lr=self.learning_rate, betas=betas, eps=settings.eps or 1e-8,
                                                 weight_decay=settings.weight_decay, **apart))
        if muon:
            self.parts.append(Muon(
                muon, momentum=settings.muon_momentum, weight_decay=settings.weight_decay, adjust_lr_fn="original"))
        self.full = [[g["lr"] for g in part.param_groups] for part in self.parts]

    def clip(self) -> torch.Tensor:
        """Limits the norm of the gradients, of each network by itself; the largest norm there was."""
        limit = self.settings.clip or float("inf")
        one = sharded.clip if any(map(sharded.is_part, self.parameters)) else torch.nn.utils.clip_grad_norm_
        return torch.stack([one(some, limit) for some in self.clipped.values()]).max()

    def step(self, step: int):
        share = learning_rate_share(step, self.steps, self.settings)
        for part, learning_rates in zip(self.parts, self.full, strict=True):
            for group, learning_rate in zip(part.param_groups, learning_rates, strict=True):
                group["lr"] = learning_rate * share
            part.step()
            part.zero_grad(set_to_none=True)
        return share

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the optimizers remember, flat, for safetensors: part.parameter.name."""
        return {f"{i}.{j}.{name}": sharded.whole(value) if torch.is_tensor(value) else torch.tensor(value)
                for i, part in enumerate(self.parts)
                for j, state in part.state_dict()["state"].items()
                for name, value in (state | state.get(QUANT_STATE, {})).items() if name != QUANT_STATE}

    def load(self, tensors: dict[str, torch.Tensor]):
        for i, part in enumerate(self.parts):
            state, own = {}, [p for group in part.param_groups for p in group["params"]]
            for key, value in tensors.items():
                which, parameter, name = key.split(".", 2)
                if int(which) == i:  # bitsandbytes counts steps as a plain number
                    whole = value.ndim == 0 and not value.is_floating_point()
                    state.setdefault(int(parameter), {})[name] = \
                        value.item() if whole else sharded.part(value, own[int(parameter)])
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
