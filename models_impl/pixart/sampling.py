"""The noise of PixArt: its schedule, the samplers that undo it, and the training formulas.

A state is x = alpha * sample + std * noise with alpha^2 + std^2 = 1, and sigma = std / alpha. `timestep` is what the
network is conditioned on, any number from 0 to 999. The step before 0 is CLEAN: there alpha is 1 and sigma is 0.

Every sampler walks a list of falling timesteps, from the state at the first to the state at the last, so a schedule may
start late or be cut in two; only at CLEAN it ends with the network's estimate. After a cut a multistep solver restarts
at its first order.
(diffusion/model/{dpm_solver,sa_solver,gaussian_diffusion}.py, diffusion/lcm_scheduler.py and train_scripts/ of
PixArt-alpha/PixArt-sigma@1ce521a)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .config import PixArtConfig

CLEAN = -1.0  # the timestep without noise
TRAIN_TIMESTEPS = 1000
DMD_TIMESTEP = 400  # where the released one-step student was trained
ZERO_SNR_ALPHA = 2.0**-12  # as diffusers: sigma 4096 instead of infinity
STOCHASTIC_TIMES = (0.2, 0.8)  # of SA-Solver, as shares of the whole time
HUBER_C = 0.001
LCM_SIGMA_DATA = 0.5
LCM_TIME_SCALE = 10
SNR_LOSS_TIMESTEP = 249

Predict = Callable[[Tensor, float], Tensor]
"""(x, timestep) -> eps, guidance already applied. A velocity becomes eps by `NoiseSchedule.eps`."""
Noise = Callable[[int, torch.Size], Tensor]
"""(index of the step, shape) -> noise."""
Callback = Callable[[int, Tensor, Tensor], None]
"""(index of the step, x, denoised), once per step; x is the state that the estimate was made from."""
AfterStep = Callable[[Tensor, "float | None"], Tensor]
"""(x, its timestep, or None after the last step of a list that ends at 0 or CLEAN) -> x. Blends in a known region."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise level by timestep: log(alpha) is linear between whole timesteps (NoiseScheduleVP).

    Methods take a float and give one, or take a tensor and give one of its shape, float32 or, for float64, float64.
    With zero terminal SNR (arXiv 2305.08891, algorithm 1) alpha at the last timestep is ZERO_SNR_ALPHA and not 0: an
    eps predictor says nothing about the sample there, and the samplers divide by it.
    """

    kind: str = "linear"
    steps: int = TRAIN_TIMESTEPS
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = False

    @classmethod
    def of(cls, config: PixArtConfig) -> NoiseSchedule:
        """The schedule that a checkpoint was trained on."""
        return cls(config.schedule, TRAIN_TIMESTEPS, config.beta_start, config.beta_end, config.zero_terminal_snr)

    def __post_init__(self):
        if self.kind not in ("linear", "scaled_linear"):
            raise ValueError(f"The noise schedule {self.kind!r} is not one of linear, scaled_linear.")
        if self.steps < 2:
            raise ValueError(f"A noise schedule of steps={self.steps} is too short; PixArt has {TRAIN_TIMESTEPS}.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} must rise from above 0 to below 1."
            )

    @cached_property
    def betas(self) -> Tensor:
        """(steps,) float64"""
        if self.zero_terminal_snr:
            before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
            return 1 - self.alphas_cumprod / before
        return self._plain_betas

    @property
    def _plain_betas(self) -> Tensor:
        if self.kind == "scaled_linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64).square()
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at the whole timesteps, (steps,) float64; with zero terminal SNR the last one is 0."""
        cumprod = (1 - self._plain_betas).cumprod(0)
        if not self.zero_terminal_snr:
            return cumprod
        alphas = cumprod.sqrt()
        return ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))).square()

    @cached_property
    def _log_alphas(self) -> Tensor:
        """log(alpha) at CLEAN, 0, 1, ... steps - 1."""
        logs = self.alphas_cumprod.clamp(min=ZERO_SNR_ALPHA**2 if self.zero_terminal_snr else 0).log() / 2
        return torch.cat([torch.zeros(1, dtype=torch.float64), logs])

    # --- How much noise

    def log_alpha(self, timestep):
        return _same_kind(self._log_alpha, timestep)

    def alpha(self, timestep):
        """The share of the sample in the state."""
        return _same_kind(lambda t: self._log_alpha(t).exp(), timestep)

    def std(self, timestep):
        """The share of the noise in the state."""
        return _same_kind(lambda t: (-torch.expm1(2 * self._log_alpha(t))).sqrt(), timestep)

    def sigma(self, timestep):
        """std / alpha"""
        return _same_kind(lambda t: torch.expm1(-2 * self._log_alpha(t)).sqrt(), timestep)

    def timestep(self, sigma):
        """The inverse of `sigma`; more noise than at the last timestep counts as the last timestep."""
        return _same_kind(self._timestep, sigma)

    def _log_alpha(self, timestep: Tensor) -> Tensor:
        place = timestep.clamp(CLEAN, self.steps - 1) + 1
        low = place.floor().long().clamp(max=self.steps - 1)
        return torch.lerp(self._log_alphas[low], self._log_alphas[low + 1], place - low)

    def _timestep(self, sigma: Tensor) -> Tensor:
        falling = self._log_alphas
        log_alpha = (-torch.log1p(sigma.square()) / 2).clamp(min=falling[-1].item())
        low = torch.searchsorted(-falling, -log_alpha, right=True).clamp(1, self.steps) - 1
        return low - 1 + (log_alpha - falling[low]) / (falling[low + 1] - falling[low])

    def sigmas(self, timesteps: Sequence[float]) -> Tensor:
        """A list of timesteps as ComfyUI's SIGMAS: (len(timesteps),) float32, 0 at CLEAN."""
        return torch.tensor([self.sigma(t) for t in timesteps])

    def timesteps(self, sigmas: Tensor) -> list[float]:
        """The inverse of `sigmas`. What is whole but for the rounding of float32 (1e-4) becomes whole."""
        exact = [self.timestep(float(s)) for s in sigmas]
        return [float(round(t)) if abs(t - round(t)) < 1e-4 else t for t in exact]

    # --- What a prediction means. x, noise, eps, velocity: (B, C, H, W)
    # timestep: a number, then the result has x's dtype; or (B,), then it has at least float32

    def add_noise(self, sample: Tensor, noise: Tensor, timestep) -> Tensor:
        return self._like(self.alpha, timestep, sample) * sample + self._like(self.std, timestep, sample) * noise

    def denoised(self, x: Tensor, eps: Tensor, timestep) -> Tensor:
        return (x - self._like(self.std, timestep, x) * eps) / self._like(self.alpha, timestep, x)

    def velocity(self, sample: Tensor, noise: Tensor, timestep) -> Tensor:
        """Target of a v-prediction network: alpha * noise - std * sample (arXiv 2202.00512, appendix D)."""
        return self._like(self.alpha, timestep, sample) * noise - self._like(self.std, timestep, sample) * sample

    def denoised_from_velocity(self, x: Tensor, velocity: Tensor, timestep) -> Tensor:
        """Finite for every timestep: nothing is divided."""
        return self._like(self.alpha, timestep, x) * x - self._like(self.std, timestep, x) * velocity

    def eps(self, x: Tensor, velocity: Tensor, timestep) -> Tensor:
        """The eps that a velocity implies; finite for every timestep. At zero SNR it is x itself, whatever the
        velocity: float32 keeps three digits of the sample there."""
        return self._like(self.std, timestep, x) * x + self._like(self.alpha, timestep, x) * velocity

    def eps_from_denoised(self, x: Tensor, denoised: Tensor, timestep) -> Tensor:
        """The inverse of `denoised`. Not at CLEAN."""
        return (x - self._like(self.alpha, timestep, x) * denoised) / self._like(self.std, timestep, x)

    def min_snr_weight(self, timestep: Tensor, gamma: float = 5.0, prediction: str = "eps") -> Tensor:
        """Weight of each squared error, (B,): Min-SNR (arXiv 2303.09556, section 3.4). prediction: "eps" or "v"."""
        snr = self.sigma(timestep) ** -2
        return snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1)

    def _like(self, coefficient, timestep, x: Tensor):
        if not isinstance(timestep, Tensor):
            return coefficient(float(timestep))
        value = coefficient(timestep.double() if x.dtype == torch.float64 else timestep)
        return _column(value, x, _state_dtype(x))


def _same_kind(formula, value):
    if not isinstance(value, Tensor):
        return formula(torch.tensor(float(value), dtype=torch.float64)).item()
    # On the CPU, because not every device has float64; cast there as well, for a copy may cast at either end.
    result = formula(value.detach().cpu().double())
    return result.to(torch.float64 if value.dtype == torch.float64 else torch.float32).to(value.device)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- Lists of timesteps, high to low: one more than steps, the last is where the sample is left

def time_uniform(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Timesteps even in time, fractional, from the last timestep to 0: DPM-Solver++ and SA-Solver as PixArt runs them.

    0 is not CLEAN: the sample keeps noise of sigma 0.01, as in the reference.
    """
    return _power(steps, train_steps, 1)


def time_quadratic(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Timesteps as in time_uniform, but denser towards 0: even in the square root of time."""
    return _power(steps, train_steps, 2)


def _power(steps: int, train_steps: int, power: float) -> list[float]:
    _at_least_one(steps)
    root = train_steps ** (-1 / power)  # of the first of the times (timestep + 1) / train_steps, which end at 1
    times = [(1 + (root - 1) * i / steps) ** power for i in range(steps)]
    return [t * train_steps - 1 for t in times] + [0.0]


def logsnr_uniform(steps: int, schedule: NoiseSchedule) -> list[float]:
    """Timesteps even in log(sigma), from the last timestep to 0."""
    return _between_sigmas(steps, schedule, math.log, math.exp)


def karras(steps: int, schedule: NoiseSchedule, rho: float = 7.0) -> list[float]:
    """Timesteps even in sigma^(1/rho) (arXiv 2206.00364, eq. 5), from the last timestep, or sigma 80, to 0."""
    return _between_sigmas(steps, schedule, lambda s: min(s, 80.0) ** (1 / rho), lambda r: r**rho)


def _between_sigmas(steps: int, schedule: NoiseSchedule, curve, inverse) -> list[float]:
    _at_least_one(steps)
    first, last = curve(schedule.sigma(schedule.steps - 1)), curve(schedule.sigma(0))
    return [schedule.timestep(inverse(first + (last - first) * i / steps)) for i in range(steps)] + [0.0]


def iddpm_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whole, evenly spread from the last timestep to 0, then CLEAN. (respace.py, one section)"""
    _at_least_one(steps, train_steps)
    if steps == 1:
        return [train_steps - 1.0, CLEAN]  # the reference's single step would be at 0, where no noise belongs
    place, kept = 0.0, []
    for _ in range(steps):  # summed up, not multiplied: halves must round as the reference's do
        kept.append(float(round(place)))
        place += (train_steps - 1) / (steps - 1)
    return [*reversed(kept), CLEAN]


def lcm_timesteps(steps: int, origin: int = 50, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """The timesteps, of the distillation's `origin`, that a sampler of `steps` steps visits, then CLEAN."""
    if not 1 <= origin <= train_steps:
        raise ValueError(f"origin={origin} must be between 1 and the {train_steps} timesteps of training.")
    _at_least_one(steps, origin)
    kept = [k * (train_steps // origin) - 1.0 for k in range(1, origin + 1)][:: -(origin // steps)]
    return [*kept[:steps], CLEAN]


def linspace_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whole, from the last timestep towards 0, then CLEAN: diffusers' "linspace", what the PixArt pipelines use."""
    _at_least_one(steps, train_steps)
    return [*(float(round(i * ((train_steps - 1) / steps))) for i in range(steps, 0, -1)), CLEAN]


def leading_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Timesteps at whole multiples of the same stride, then CLEAN: diffusers' "leading"."""
    _at_least_one(steps, train_steps - 1)
    return [*(float(i * (train_steps // (steps + 1))) for i in range(steps, 0, -1)), CLEAN]


def trailing_timesteps(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whole, evenly spread, beginning with the last timestep, then CLEAN: diffusers' "trailing", for zero SNR."""
    _at_least_one(steps, train_steps)
    return [*(float(round(train_steps - i * (train_steps / steps)) - 1) for i in range(steps)), CLEAN]


def _at_least_one(steps: int, limit: float = math.inf):
    if not 1 <= steps <= limit:
        raise ValueError(f"steps={steps} must be at least 1" + (f" and at most {limit}." if limit < math.inf else "."))


# --- Sampling. x: (B, C, H, W), the state at the first timestep; the state at the last is returned in x's dtype

def dpm_solver_pp(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    order: int = 2,
    solver_type: str = "dpmsolver",
    lower_order_final: bool = True,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ (arXiv 2211.01095, algorithm 2) of order 1 (DDIM), 2 or 3, as PixArt runs it.

    lower_order_final: end on lower orders at any number of steps. PixArt's edit; without, only CLEAN is of order 1.
    solver_type: "dpmsolver" or "taylor", two weights of the second-order term.
    """
    steps = len(timesteps) - 1
    orders = [min(order, i + 1, steps - i if lower_order_final else order) for i in range(steps)]
    return _multistep(predict, x, schedule, timesteps, order, orders, solver_type, callback, after_step)


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
    ends = [steps - i if steps < 15 else order for i in range(steps)]
    orders = [min(order, i + 1, ends[i]) for i in range(steps)]
    return _multistep(predict, x, schedule, timesteps, order, orders, "dpmsolver", callback, after_step)


def dmd(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timestep: float = DMD_TIMESTEP,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """One step of a distribution-matched student (arXiv 2311.18828). x is white noise of variance 1, not scaled."""
    return dpm_solver_pp(predict, x, schedule, [timestep, CLEAN], 1, callback=callback, after_step=after_step)


def _multistep(predict, x, schedule, timesteps, order, orders, solver_type, callback, after_step) -> Tensor:
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver++ has the orders 1, 2 and 3, not {order}.")
    if solver_type not in ("dpmsolver", "taylor"):
        raise ValueError(f"solver_type={solver_type!r} is not one of dpmsolver, taylor.")
    points = _points(timesteps, schedule)
    nodes = [_half_log_snr(schedule, t) for t in points]
    estimates = []

    def step(index, x, denoised, _):
        estimates[:] = [*estimates[-2:], denoised]
        near = nodes[index + 1 - orders[index]:index + 2]
        return _dpm_update(x, estimates, near, schedule, points[index], points[index + 1], solver_type)

    return _walk(_denoiser(predict, schedule, x.dtype), x, points, step, callback, after_step)


def _dpm_update(x, estimates, nodes, schedule, now, then, solver_type) -> Tensor:
    """nodes: half log SNR at as many estimates as the order has, oldest first, and at the next timestep."""
    alpha, order = schedule.alpha(then), len(nodes) - 1
    h = nodes[-1] - nodes[-2]
    phi1 = math.expm1(-h)
    x = schedule.std(then) / schedule.std(now) * x - alpha * phi1 * estimates[-1]
    if order == 1:
        return x
    slope = (estimates[-1] - estimates[-2]) * (h / (nodes[-2] - nodes[-3]))
    if order == 2:
        weight = phi1 / h + 1 if solver_type == "taylor" else -phi1 / 2
        return x + alpha * weight * slope
    r0, r1 = (nodes[-2] - nodes[-3]) / h, (nodes[-3] - nodes[-4]) / h
    bend = (slope - (estimates[-2] - estimates[-3]) / r1) / (r0 + r1)
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    return x + alpha * phi2 * (slope + r0 * bend) - alpha * phi3 * bend


def iddpm(
    predict: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Ancestral sampling with the learned variance (arXiv 2102.09672, section 3.1 and eq. 15).

    predict gives (eps, variance logits), each (B, C, H, W); the logits are in [-1, 1], between the least and the
    greatest variance that a step can have.
    """
    points, dtype = _points(timesteps, schedule), x.dtype

    def denoise(x, timestep):
        eps, logits = (part.to(x) for part in predict(x.to(dtype), timestep))
        return schedule.denoised(x, eps, timestep), logits

    def step(index, x, denoised, logits):
        mean_denoised, mean_x, low, high = _posterior(schedule, points[index], points[index + 1])
        share = (logits + 1) / 2
        std = torch.exp((share * math.log(high) + (1 - share) * math.log(low)) / 2)
        return mean_denoised * denoised + mean_x * x + std * noise(index, x.shape).to(x)

    return _walk(denoise, x, points, step, callback, after_step)


def _posterior(schedule: NoiseSchedule, now, then) -> tuple:
    """q(x at `then` | x at `now`, sample): the weights of sample and x in its mean, its variance, and beta."""
    kept_now, kept_then = schedule.alpha(now) ** 2, schedule.alpha(then) ** 2
    beta = 1 - kept_now / kept_then
    rest = schedule.std(then) ** 2 / schedule.std(now) ** 2
    return beta * kept_then**0.5 / (1 - kept_now), rest * (1 - beta) ** 0.5, beta * rest, beta


def lcm(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2310.04378), without guidance. With lcm_timesteps.

    At CLEAN it returns the last estimate; the reference's scheduler noises that once more.
    """
    points = _points(timesteps, schedule)
    plain = _denoiser(predict, schedule, x.dtype)

    def denoise(x, timestep):
        return consistency(x, plain(x, timestep)[0], timestep), None

    def step(index, x, denoised, _):
        return schedule.add_noise(denoised, noise(index, x.shape).to(x), points[index + 1])

    return _walk(denoise, x, points, step, callback, after_step)


def sa_solver(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    noise: Noise,
    predictor_order: int = 2,
    corrector_order: int = 2,
    eta: float = 1.0,
    evaluate_twice: bool = False,
    more_steps: bool = False,
    callback: Callback | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Stochastic Adams predictor and corrector (SA-Solver, arXiv 2309.05019). With time_uniform.

    eta: tau, the strength of the noise, in the middle of the time; 0 solves the ODE. corrector_order 0: no corrector.
    evaluate_twice: "PECE", the network also sees the corrected state. more_steps: the reference's other mode, plain
    second order, and where the list ends at 0 with that step corrected and its estimate returned: two evaluations more.
    The reference draws one noise more before its first step and throws it away.
    """
    if predictor_order < 1 or corrector_order < 0:
        raise ValueError(f"predictor_order={predictor_order} must be at least 1, and corrector_order={corrector_order} "
                         "at least 0, which means no corrector.")
    points = _points(timesteps, schedule)
    dtype, x = x.dtype, x.to(_state_dtype(x))
    finish = more_steps and points[-1] == 0
    steps, settled = len(points) - 1, max(predictor_order, corrector_order - 1)
    nodes = [_half_log_snr(schedule, t) for t in points]
    evaluate = _denoiser(predict, schedule, dtype)
    estimates = []

    def evaluated(index, x):
        denoised, _ = evaluate(x, points[index])
        if callback is not None and index < steps:
            callback(index, x, denoised)
        return denoised

    estimates.append(evaluated(0, x))
    for n in range(1, steps + 1):
        last = n == steps and not finish
        if points[n] < 0:
            x = estimates[-1]
        else:
            tau = 0 if last else _tau(points[n], eta, schedule)
            order = min(predictor_order, n if n < settled else steps - n + 1)
            start = _sa_start(x, schedule, points[n - 1], points[n], tau, noise, n - 1)
            x = start + _adams(nodes, n, n - 1, order, estimates, tau, schedule.alpha(points[n]), not more_steps)
            if not last:
                estimates.append(evaluated(n, x))
            if corrector_order and not last:
                order = min(corrector_order, n + 1 if n < settled else steps - n + 2)
                x = start + _adams(nodes, n, n, order, estimates, tau, schedule.alpha(points[n]), not more_steps)
                if evaluate_twice and n < steps:
                    estimates[-1], _ = evaluate(x, points[n])
            del estimates[:-max(settled, corrector_order)]
        if after_step is not None:
            x = after_step(x, None if last and points[n] <= 0 else points[n])
    if finish:
        x, _ = evaluate(x, points[-1])
        if after_step is not None:
            x = after_step(x, None)
    return x.to(dtype)


def _tau(timestep: float, eta: float, schedule: NoiseSchedule) -> float:
    first, last = STOCHASTIC_TIMES
    return eta if first <= (timestep + 1) / schedule.steps <= last else 0


def _sa_start(x, schedule, now, then, tau, noise, index) -> Tensor:
    """The part that predictor and corrector of a step share: the old state and the noise."""
    decay = math.exp(-(tau**2) * (_half_log_snr(schedule, then) - _half_log_snr(schedule, now)))
    start = decay * schedule.std(then) / schedule.std(now) * x
    if not tau:
        return start
    return start + schedule.std(then) * math.sqrt(1 - decay**2) * noise(index, x.shape).to(x)


def _adams(nodes, n, newest, order, estimates, tau, alpha, rescaled) -> Tensor:
    """The integral over the step to nodes[n] of the polynomial through the last `order` estimates (eq. 15 and 18).

    newest: index of the node of estimates[-1]. The integral is alpha q int_{-h}^0 exp(q u) D(u) du, where u = 0 is the
    end of the step and q = 1 + tau^2.
    """
    q, h = 1 + tau**2, nodes[n] - nodes[n - 1]
    places = [nodes[newest - i] - nodes[n] for i in range(order)]
    moments = _moments(q, h, order)
    if order == 2 and rescaled:
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


def _walk(denoise, x, points, step, callback, after_step) -> Tensor:
    """denoise(x, timestep) -> (denoised, more); step(index, x, denoised, more) -> x at the next timestep."""
    dtype, x = x.dtype, x.to(_state_dtype(x))
    for index, (now, then) in enumerate(pairwise(points)):
        denoised, more = denoise(x, now)
        if callback is not None:
            callback(index, x, denoised)
        x = step(index, x, denoised, more) if then >= 0 else denoised
        if after_step is not None:
            x = after_step(x, None if index == len(points) - 2 and then <= 0 else then)
    return x.to(dtype)


def _denoiser(predict: Predict, schedule: NoiseSchedule, dtype: torch.dtype):
    """The network sees `dtype`, the solver's arithmetic stays in the state's own."""
    return lambda x, timestep: (schedule.denoised(x, predict(x.to(dtype), timestep).to(x), timestep), None)


def _points(timesteps: Sequence[float], schedule: NoiseSchedule) -> list[float]:
    points = [float(t) for t in timesteps]
    if len(points) < 2 or any(a <= b for a, b in pairwise(points)):
        raise ValueError(f"A sampler needs at least two timesteps that fall from step to step, got {points}.")
    if points[0] > schedule.steps - 1 or points[-2] < 0 or points[-1] < CLEAN:
        raise ValueError(f"Timesteps lie between {schedule.steps - 1} and 0, or end with {CLEAN:g}; got {points}.")
    if CLEAN < points[-1] < 0:
        raise ValueError(f"The last timestep, {points[-1]}, is neither {CLEAN:g}, which is clean, nor at least 0.")
    return points


def _half_log_snr(schedule: NoiseSchedule, timestep: float) -> float:
    """lambda of the papers; infinite at CLEAN."""
    return -math.log(schedule.sigma(timestep)) if timestep >= 0 else math.inf


# --- Training. timestep: (B,) whole; losses in float32, differentiable in the predictions

@dataclass(frozen=True)
class IddpmLoss:
    """Parts of the loss, (B,) each. The trainer takes the mean of `total`."""

    mse: Tensor
    vb: Tensor
    """The loss of the variance, in bits per value. Its gradient reaches the logits, not eps."""

    @property
    def total(self) -> Tensor:
        return self.mse + self.vb


def iddpm_loss(
    eps: Tensor,
    logits: Tensor | None,
    sample: Tensor,
    noise: Tensor,
    timestep: Tensor,
    schedule: NoiseSchedule,
    snr: bool = False,
) -> IddpmLoss:
    """L_hybrid with the weight 1 for its second part (arXiv 2102.09672, eq. 16 has 0.001), as PixArt was trained.

    eps, logits: the network's two halves at schedule.add_noise(sample, noise, timestep), (B, C, H, W) each; without
    logits vb is 0. snr: learn the sample instead of the noise up to timestep 249 (`snr_loss`; not Min-SNR).
    """
    eps, sample, noise = eps.float(), sample.float(), noise.float()
    noisy = schedule.add_noise(sample, noise, timestep)
    error = noise - eps
    if snr:
        late = _column(timestep <= SNR_LOSS_TIMESTEP, eps)
        error = torch.where(late, sample - schedule.denoised(noisy, eps, timestep), error)
    mse = error.square().flatten(1).mean(1)
    if logits is None:
        return IddpmLoss(mse, torch.zeros_like(mse))
    return IddpmLoss(mse, variance_bound(eps.detach(), logits.float(), sample, noisy, timestep, schedule))


def variance_bound(
    eps: Tensor, logits: Tensor, sample: Tensor, noisy: Tensor, timestep: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """KL divergence of the true step down from `timestep` and the predicted one, in bits per value: (B,).

    At timestep 0 the negative log likelihood of the sample, in bins of 1/255 around it with open ends at -1 and 1, as
    if it were pixels: the released weights were trained on that.
    """
    now = timestep.detach().cpu().double()
    from_sample, from_x, _, high = _posterior(schedule, now, now - 1)
    low = _posterior(schedule, now.clamp(min=1), now.clamp(min=1) - 1)[2]  # at 0 it is 0: the next one is used
    low, high, from_sample, from_x, scale, sigma = _columns(
        (low.log(), high.log(), from_sample, from_x, 1 / schedule.alpha(now), schedule.sigma(now)), eps, eps.dtype)

    share = (logits + 1) / 2
    log_variance = share * high + (1 - share) * low
    # Not schedule.denoised: the logarithm of a difference of float32 at timestep 0 shows every rounding before it.
    denoised = scale * noisy - sigma * eps
    off = from_sample * (sample - denoised)  # of the means
    kl = (log_variance - low - 1 + torch.exp(low - log_variance) + off.square() * torch.exp(-log_variance)) / 2
    nll = -_log_likelihood(sample, from_sample * denoised + from_x * noisy, log_variance / 2)
    bound = torch.where(_column(timestep == 0, eps), nll, kl)
    return bound.flatten(1).mean(1) / math.log(2)


def _log_likelihood(sample: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log likelihood of the bin of width 2/255 around each value, elementwise. (diffusion_utils.py)"""
    sharpness = torch.exp(-log_std)
    above = _normal_cdf(sharpness * (sample - mean + 1 / 255))
    below = _normal_cdf(sharpness * (sample - mean - 1 / 255))
    inside = torch.where(sample < -0.999, above, torch.where(sample > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _column(value: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """value (B,) as (B, 1, ...) where `like` is; cast before it is moved, for not every device has float64."""
    return value.to(dtype or value.dtype).to(like.device).view(-1, *[1] * (like.ndim - 1))


def _columns(values: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """The same of several, moved together: each move to a GPU is something that it waits for."""
    return _column(torch.stack(tuple(values)).flatten(), like, dtype).unflatten(0, (len(values), -1)).unbind(0)


def consistency(x: Tensor, denoised: Tensor, timestep) -> Tensor:
    """c_skip x + c_out denoised: what a consistency model answers (arXiv 2310.04378; lcm_scheduler.py)."""
    c_skip, c_out = consistency_weights(timestep)
    if isinstance(timestep, Tensor):
        c_skip, c_out = (_column(c, x) for c in (c_skip, c_out))
    return c_skip * x + c_out * denoised


def consistency_weights(timestep):
    """(c_skip, c_out): (1, 0) at timestep 0, nearly (0, 1) elsewhere."""
    scaled = timestep * LCM_TIME_SCALE
    square = scaled**2 + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / square, scaled / square**0.5


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
        kept = _column(self.alphas_cumprod_before[index.cpu()], denoised, denoised.dtype)
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


TrainPredict = Callable[[Tensor, Tensor], Tensor]
"""(x, timestep (B,)) -> eps"""


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
    return LcmStep(each.mean(), noisy, student_denoised, prediction, denoised, eps, before, goal)


@dataclass(frozen=True)
class DmdLoss:
    loss: Tensor
    """(), whose gradient with respect to `generated` is weight * direction times a constant."""
    direction: Tensor
    """Direction from the teacher's estimate to the estimate that fake_eps gives, (B, C, H, W)."""
    weight: Tensor
    """(B, 1, 1, 1)"""
    real_denoised: Tensor
    """The teacher's estimate, (B, C, H, W)."""


def dmd_loss(
    generated: Tensor, noisy: Tensor, real_eps: Tensor, fake_eps: Tensor, timestep: Tensor, schedule: NoiseSchedule
) -> DmdLoss:
    """Distribution matching (arXiv 2311.18828). Its gradient reaches only `generated`.

    noisy: add_noise(generated, noise, timestep); real_eps: the guided teacher there; fake_eps: the network that
    follows the student there. (train_pixart_dmd.py)
    """
    with torch.no_grad():
        direction = _column(schedule.sigma(timestep), generated) * (real_eps - fake_eps)
        real_denoised = schedule.denoised(noisy, real_eps, timestep)
        weight = 1 / ((generated - real_denoised).abs().mean((1, 2, 3), keepdim=True) + 1e-5)
        goal = generated - weight * direction
    return DmdLoss((generated.float() - goal.float()).square().mean(), direction, weight, real_denoised)


def eps_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """(B,) squared error: of the network that follows the student of DMD, and of LoRAs by the diffusers scripts."""
    return (eps.float() - noise.float()).square().flatten(1).mean(1)
