"""Latent consistency distillation (arXiv 2310.04378), as PixArt's LCM was made. (train_pixart_lcm.py)"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .consistency import consistency
from .schedule import NoiseSchedule, column

HUBER_C = 0.001

TrainPredict = Callable[[Tensor, Tensor], Tensor]
"""(x, timestep (B,)) -> eps"""


@dataclass(frozen=True)
class LcmGrid:
    """The timesteps between which consistency is taught. `index`: (B,) whole, 0 to steps - 1."""

    schedule: NoiseSchedule
    steps: int = 50

    def __post_init__(self):
        if not 1 <= self.steps <= self.schedule.steps:
            raise ValueError(f"steps={self.steps} of the LCM grid must be between 1 and {self.schedule.steps}.")

    @property
    def stride(self) -> int:
        return self.schedule.steps // self.steps

    @cached_property
    def timesteps(self) -> Tensor:
        """(steps,) int64, rising: 19, 39, ... 999."""
        return torch.arange(1, self.steps + 1) * self.stride - 1

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 there, (steps,) float64."""
        return self.schedule.alpha(self.timesteps.double()) ** 2

    @cached_property
    def alphas_cumprod_before(self) -> Tensor:
        """alpha^2 where a DDIM step down ends: the grid's timestep before, or 0."""
        return self.schedule.alpha(torch.cat([torch.zeros(1), self.timesteps[:-1]]).double()) ** 2

    def pair(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(start, end): the timesteps of the student and of the target, (B,) int64 on the device of index."""
        start = self.timesteps.to(index.device)[index]
        return start, (start - self.stride).clamp(min=0)

    def ddim(self, denoised: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """One DDIM step from the start of each pair to its end."""
        kept = column(self.alphas_cumprod_before[index.cpu()], denoised, denoised.dtype)
        return kept.sqrt() * denoised + (1 - kept).sqrt() * eps


@dataclass(frozen=True)
class LcmStep:
    """A step of consistency distillation; all but loss are (B, C, H, W)."""

    loss: Tensor
    """(), with the student's gradient."""
    noisy: Tensor
    student_denoised: Tensor
    prediction: Tensor
    teacher_denoised: Tensor
    teacher_eps: Tensor
    before: Tensor
    """The teacher's DDIM step down."""
    target: Tensor
    each: Tensor
    """The loss of each picture, (B,), of which `loss` is the mean."""


def lcm_distillation(
    student: TrainPredict,
    teacher: TrainPredict,
    teacher_uncond: TrainPredict,
    target: TrainPredict,
    sample: Tensor,
    noise: Tensor,
    index: Tensor,
    grid: LcmGrid,
    guidance: float = 4.5,
    loss_type: str = "huber",
    huber_c: float = HUBER_C,
) -> LcmStep:
    """Latent consistency distillation (arXiv 2310.04378), as PixArt's LCM was made.

    target is the moving average of the student, or for a LoRA the student itself. The teacher is guided by
    cond + guidance * (cond - uncond): a cfg of 1 + guidance. (train_pixart_lcm.py)
    """
    if loss_type not in ("huber", "l2"):
        raise ValueError(f"loss_type={loss_type!r} is not one of huber, l2.")
    schedule = grid.schedule
    start, end = grid.pair(index)
    noisy = schedule.add_noise(sample, noise, start)
    student_denoised = schedule.denoised(noisy, student(noisy, start), start)
    prediction = consistency(noisy, student_denoised, start)
    with torch.no_grad():
        cond, uncond = teacher(noisy, start), teacher_uncond(noisy, start)
        eps = cond + guidance * (cond - uncond)
        denoised = schedule.denoised(noisy, eps, start)
        before = grid.ddim(denoised, eps, index)
        goal = consistency(before, schedule.denoised(before, target(before, end), end), end)
    error = prediction.float() - goal.float()
    each = error.square() if loss_type == "l2" else (error.square() + huber_c**2).sqrt() - huber_c
    return LcmStep(each.mean(), noisy, student_denoised, prediction, denoised, eps, before, goal,
                   each.flatten(1).mean(1))
