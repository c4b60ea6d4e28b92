"""DPM-Solver++ (arXiv 2211.01095), as PixArt and as diffusers run it."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from ...family import Callback
from .schedule import NoiseSchedule, half_log_snr
from .walk import AfterStep, Predict, denoiser, points_of, walk


def dpm_solver_pp(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    order: int = 2,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ of order 1 (DDIM), 2 or 3, as PixArt runs it: it ends on lower orders at any number of
    steps. With time_uniform."""
    orders = _orders(order, range(len(timesteps) - 1, 0, -1))
    return multistep(predict, x, schedule, timesteps, orders, callback, after_step)


def dpm_diffusers(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    order: int = 2,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """The same solver as diffusers' DPMSolverMultistepScheduler runs it in the PixArt pipelines.

    With linspace_timesteps. It lowers the order at the end only below 15 steps, or to reach CLEAN.
    """
    steps = len(timesteps) - 1
    orders = _orders(order, range(steps, 0, -1) if steps < 15 else [order] * steps)
    return multistep(predict, x, schedule, timesteps, orders, callback, after_step)


def _orders(order: int, most: Iterable[int]) -> list[int]:
    """The order of each step: it rises with the estimates that are known. most: what it may be at the end."""
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver++ has the orders 1, 2 and 3, not {order}.")
    return [min(order, i + 1, limit) for i, limit in enumerate(most)]


def multistep(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    orders: Sequence[int],
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """DPM-Solver++ (algorithm 2) with an order for each step: 1 to 3, and at most one more than steps before it."""
    points = points_of(timesteps, schedule)
    nodes = [half_log_snr(schedule, t) for t in points]
    estimates = []

    def step(index, x, denoised, _):
        estimates[:] = [*estimates[-2:], denoised]
        near = nodes[index + 1 - orders[index]:index + 2]
        return _update(x, estimates, near, schedule, points[index], points[index + 1])

    return walk(denoiser(predict, schedule, x.dtype), x, points, step, callback, after_step)


def _update(x, estimates, nodes, schedule, now, then) -> Tensor:
    """nodes: half log SNR at as many estimates as the order has, oldest first, and at the next timestep."""
    alpha, order = schedule.alpha(then), len(nodes) - 1
    h = nodes[-1] - nodes[-2]
    phi1 = math.expm1(-h)
    x = schedule.std(then) / schedule.std(now) * x - alpha * phi1 * estimates[-1]
    if order == 1:
        return x
    slope = (estimates[-1] - estimates[-2]) * (h / (nodes[-2] - nodes[-3]))
    if order == 2:
        return x + alpha * (-phi1 / 2) * slope
    r0, r1 = (nodes[-2] - nodes[-3]) / h, (nodes[-3] - nodes[-4]) / h
    bend = (slope - (estimates[-2] - estimates[-3]) / r1) / (r0 + r1)
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    return x + alpha * phi2 * (slope + r0 * bend) - alpha * phi3 * bend
