"""Solvers of one stage: Euler, and Dormand and Prince's pair of fifth and fourth order with adaptive steps.

Not torchdiffeq: the nodes need only what ComfyUI brings, which it is not part of; progress, previews and cancelling are
due at every accepted step, with its velocity; and torchdiffeq's last step runs past the end of the stage, where the
network is conditioned on times of the next one. `dopri5_reference` does that, for comparison with the release.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .stages import Stages

Predict = Callable[[Tensor, float, int, float], Tensor]
"""(x, timestep, stage, cfg) -> velocity, guidance already applied."""


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage: the solver's grid and the guidance."""

    stage: int
    timesteps: tuple[float, ...]
    """Timesteps that the network is conditioned on, one per Euler step."""
    times: tuple[float, ...]
    """t inside the stage, one more than timesteps; a whole stage ends with 1."""
    guidance: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def _euler(predict: Predict, x: Tensor, plan: StagePlan, stages: Stages, report) -> Tensor:
    for step, timestep in enumerate(plan.timesteps):
        velocity = predict(x, timestep, plan.stage, plan.guidance)
        report(step, x, velocity, plan.times[step])
        x = x + (plan.times[step + 1] - plan.times[step]) * velocity
    return x


RTOL, ATOL = 1e-3, 1e-6
# Dormand and Prince (1980), J. Comp. Appl. Math. 6: seven slopes, the last at the fifth-order result.
DOPRI_T = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DOPRI_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI_ERROR = (  # fifth-order minus fourth-order weights
    35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60,
)


DOPRI_MIDDLE = (  # weights of the slopes for the state half-way: Shampine (1986), Math. Comp. 46; torchdiffeq
    6025192743 / 30085553152 / 2, 0, 51252292925 / 65400821598 / 2, -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2, -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2,
)


def _dopri5(predict: Predict, x: Tensor, plan: StagePlan, stages: Stages, report, overshoot: bool = False) -> Tensor:
    """Adaptive Dormand-Prince 5(4) over the stage. Its timestep maps t in [0, 1] onto the trained range.

    The error norm is taken over the whole batch, so pictures of one batch share their steps.
    overshoot: let the last step run past the end, as torchdiffeq does, and interpolate back. The network is then called
    at times of the next stage; without, the last step ends where the stage does.
    """
    first, last = stages.first_timestep[plan.stage], stages.last_timestep[plan.stage]

    def slope(t: float, x: Tensor) -> Tensor:
        return predict(x, first + (last - first) * t, plan.stage, plan.guidance)

    t, end = plan.times[0], plan.times[-1]
    v = slope(t, x)
    dt = _first_step(slope, t, x, v)
    while t < end:
        if not overshoot:
            dt = min(dt, end - t)
        slopes = [v]
        for c, row in zip(DOPRI_T[1:], DOPRI_A[1:], strict=True):
            ahead = x + dt * _weighted(row, slopes)
            slopes.append(slope(t + c * dt, ahead))
        error = dt * _weighted(DOPRI_ERROR, slopes)
        ratio = _norm(error / (ATOL + RTOL * torch.maximum(x.abs(), ahead.abs())))
        if not math.isfinite(ratio):
            raise FloatingPointError(f"stage {plan.stage}, t={t:.4f}: velocity is not finite. Try solver euler.")
        if ratio <= 1:
            report(sum(grid <= t for grid in plan.times[:-1]) - 1, x, v, t)
            if t + dt > end and overshoot:
                middle = x + dt * _weighted(DOPRI_MIDDLE, slopes)
                return _between(x, ahead, middle, dt * v, dt * slopes[-1], (end - t) / dt)
            x, v, t = ahead, slopes[-1], t + dt if end - t > dt else end
        dt *= min(10.0, max(0.2 if ratio > 1 else 1.0, 0.9 * max(ratio, 1e-10) ** -0.2))
    report(plan.steps - 1, x, v, t)  # a draft is made of this estimate
    return x


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return sum(w * s for w, s in zip(weights, slopes, strict=True) if w)


def _between(x0: Tensor, x1: Tensor, middle: Tensor, d0: Tensor, d1: Tensor, share: float) -> Tensor:
    """State at `share` of a step: quartic through x0, middle, x1 with slopes d0, d1 (times the step) at the ends."""
    a = 2 * (d1 - d0) - 8 * (x1 + x0) + 16 * middle
    b = 5 * d0 - 3 * d1 + 18 * x0 + 14 * x1 - 32 * middle
    c = d1 - 4 * d0 - 11 * x0 - 5 * x1 + 16 * middle
    return x0 + share * (d0 + share * (c + share * (b + share * a)))


def _first_step(slope, t: float, x: Tensor, v: Tensor) -> float:
    """Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4."""
    scale = ATOL + RTOL * x.abs()
    size, speed = _norm(x / scale), _norm(v / scale)
    h0 = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    bend = _norm((slope(t + h0, x + h0 * v) - v) / scale) / h0
    h1 = max(1e-6, h0 * 1e-3) if max(speed, bend) <= 1e-15 else (0.01 / max(speed, bend)) ** (1 / 5)
    return min(100 * h0, h1)


def _norm(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


SOLVERS = {"euler": _euler, "dopri5": _dopri5, "dopri5_reference": partial(_dopri5, overshoot=True)}
