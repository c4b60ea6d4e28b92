"""SA-Solver (arXiv 2309.05019): multistep Adams predictor and corrector of the stochastic equation."""
from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...family import Callback, Noise
from .schedule import NoiseSchedule, half_log_snr, state_dtype
from .walk import AfterStep, Predict, denoiser, points_of

STOCHASTIC_TIMES = (0.2, 0.8)  # of SA-Solver, as shares of the whole time


def sa_solver(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    predictor_order: int = 2,
    corrector_order: int = 2,
    eta: float = 1.0,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Predictor and corrector as PixArt runs them: one evaluation a step, the last step predicted only. With
    time_uniform.

    eta: tau, the strength of the noise, in the middle of the time; 0 solves the ODE. corrector_order 0: no corrector.
    The reference draws one noise more before its first step and throws it away.
    """
    if predictor_order < 1 or corrector_order < 0:
        raise ValueError(f"predictor_order={predictor_order} must be at least 1, and corrector_order={corrector_order} "
                         "at least 0, which means no corrector.")
    points = points_of(timesteps, schedule)
    dtype, x = x.dtype, x.to(state_dtype(x))
    steps, settled = len(points) - 1, max(predictor_order, corrector_order - 1)
    nodes = [half_log_snr(schedule, t) for t in points]
    evaluate = denoiser(predict, schedule, dtype)
    estimates = []

    def estimate(index, x):
        denoised, _ = evaluate(x, points[index])
        if callback is not None:
            callback(index, x, denoised)
        estimates.append(denoised)

    estimate(0, x)
    for n in range(1, steps + 1):
        if points[n] < 0:
            x = estimates[-1]
        else:
            tau = 0 if n == steps else _tau(points[n], eta, schedule)
            start, alpha = _start(x, schedule, points[n - 1], points[n], tau, noise, n - 1), schedule.alpha(points[n])
            order = min(predictor_order, n if n < settled else steps - n + 1)
            x = start + _adams(nodes, n, n - 1, order, estimates, tau, alpha)
            if n < steps:
                estimate(n, x)
                if corrector_order:
                    order = min(corrector_order, n + 1 if n < settled else steps - n + 2)
                    x = start + _adams(nodes, n, n, order, estimates, tau, alpha)
            del estimates[:-max(settled, corrector_order)]
        if after_step is not None:
            x = after_step(x, None if n == steps and points[n] <= 0 else points[n])
    return x.to(dtype)


def _tau(timestep: float, eta: float, schedule: NoiseSchedule) -> float:
    first, last = STOCHASTIC_TIMES
    return eta if first <= (timestep + 1) / schedule.steps <= last else 0


def _start(x, schedule, now, then, tau, noise, index) -> Tensor:
    """The part that predictor and corrector of a step share: the old state and the noise."""
    decay = math.exp(-(tau**2) * (half_log_snr(schedule, then) - half_log_snr(schedule, now)))
    start = decay * schedule.std(then) / schedule.std(now) * x
    if not tau:
        return start
    return start + schedule.std(then) * math.sqrt(1 - decay**2) * noise(index, x.shape).to(x)


def _adams(nodes, n, newest, order, estimates, tau, alpha) -> Tensor:
    """The integral over the step to nodes[n] of the polynomial through the last `order` estimates (eq. 15 and 18).

    newest: index of the node of estimates[-1]. The integral is alpha q int_{-h}^0 exp(q u) D(u) du, where u = 0 is the
    end of the step and q = 1 + tau^2.
    """
    q, h = 1 + tau**2, nodes[n] - nodes[n - 1]
    places = [nodes[newest - i] - nodes[n] for i in range(order)]
    moments = _moments(q, h, order)
    if order == 2:
        # Appendix D: the slope's weight exp(q u) becomes 1, whose integral over (u + h) is h^2 / 2.
        moments[1] = h**2 / 2 - h * moments[0]
    total = 0
    for i, place in enumerate(places):
        weights = _lagrange(place, places[:i] + places[i + 1:])
        total = total + alpha * q * sum(w * m for w, m in zip(weights, moments, strict=True)) * estimates[-1 - i]
    return total


def _moments(q: float, h: float, count: int) -> list[float]:
    """int_{-h}^0 u^k exp(q u) du for k = 0 ... count - 1, by parts."""
    edge = math.exp(-q * h)
    moments = [-math.expm1(-q * h) / q]
    for k in range(1, count):
        moments.append((-((-h) ** k) * edge - k * moments[-1]) / q)
    return moments


def _lagrange(place: float, others: Sequence[float]) -> list[float]:
    """Coefficients, constant first, of the polynomial that is 1 at `place` and 0 at the others."""
    weights = [1.0]
    for other in others:
        raised, scaled = [0.0, *weights], [*(-other * w for w in weights), 0.0]
        weights = [(r + s) / (place - other) for r, s in zip(raised, scaled, strict=True)]
    return weights
