"""The cascade of PixelFlow (arXiv 2504.07963, section 3): stages, jumps between resolutions, solvers, training pairs.

Stage k runs at 1/2^(num_stages-1-k) of the full resolution. Inside it `t` goes from 0 to 1 and the state is
x_t = t * end + (1 - t) * start, where, for the same noise, end = e * sample + (1 - e) * noise and start is the same
mixture at s < e of the sample once more halved and doubled. The network predicts the velocity end - start.

Over the whole cascade the network's timestep only grows, so `sigma` = 1 - timestep/1000 falls from 1 to 0 and names
both the stage and the t in it. (scheduling_pixelflow.py, pipeline_pixelflow.py of ShoufaChen/PixelFlow@8805204)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import PackedLayout

TRAIN_TIMESTEPS = 1000  # of every released checkpoint
CLASS_GUIDANCE = (0, 1 / 6, 2 / 3, 1)  # share of (cfg - 1) in each stage, class-conditional
NOISE_EPS = 1e-6  # keeps the reference's covariance invertible


@dataclass(frozen=True)
class Stages:
    """The time ranges of a cascade. Tuples have one entry per stage."""

    num_stages: int = 4
    gamma: float = -1 / 3
    """Correlation of the noise inside a 2x2 block at a jump; -1/3 is the least that four values can have."""
    num_train_timesteps: int = TRAIN_TIMESTEPS

    def __post_init__(self):
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be at least 1.")

    @cached_property
    def origin(self) -> tuple[float, ...]:
        """Starts of the stages if resolutions did not differ. Cut to whole timesteps: 0.333, not 1/3."""
        steps = self.num_train_timesteps
        return tuple(int(steps * k / self.num_stages) / steps for k in range(self.num_stages))

    @property
    def last_t(self) -> float:
        """The grid of Euler steps ends here, and one last step of what remains follows: 0.999."""
        return 1 - 1 / self.num_train_timesteps

    @cached_property
    def end(self) -> tuple[float, ...]:
        """Share of the sample in the state at the end of each stage."""
        return (*self.origin[1:], 1.0)

    @cached_property
    def start(self) -> tuple[float, ...]:
        """Share of the sample at the start of each stage: o / (2 - o) for gamma = -1/3."""
        return tuple(o * self._shrink(o) for o in self.origin)

    def _shrink(self, origin: float) -> float:
        return 1 / (math.sqrt(1 - 1 / self.gamma) * (1 - origin) + origin)

    def jump(self, stage: int) -> tuple[float, float]:
        """(alpha, beta): the state entering `stage` is alpha * doubled + beta * block noise, white again."""
        alpha = self._shrink(self.origin[stage])
        return alpha, alpha * (1 - self.origin[stage]) / math.sqrt(-self.gamma)

    @cached_property
    def _ranges(self) -> tuple[tuple[float, float], ...]:
        steps, spans = self.num_train_timesteps, [e - s for s, e in zip(self.start, self.end, strict=True)]
        edges = [int(steps * sum(spans[:k]) / sum(spans)) for k in range(self.num_stages)]
        ranges = []
        for k, first in enumerate(edges):
            if k == self.num_stages - 1:
                ranges.append((float(first), steps - 1.0))
            else:  # as many values as there are timesteps, up to, but without, the first of the next stage
                ranges.append((float(first), edges[k + 1] - (edges[k + 1] - first) / steps))
        return tuple(ranges)

    @cached_property
    def first_timestep(self) -> tuple[float, ...]:
        return tuple(first for first, _ in self._ranges)

    @cached_property
    def last_timestep(self) -> tuple[float, ...]:
        """The timestep at `last_t`, the last one that is trained."""
        return tuple(last for _, last in self._ranges)

    def train_timesteps(self, stage: int) -> Tensor:
        """The timesteps from which training draws in a stage: (num_train_timesteps,) float64."""
        return torch.linspace(*self._ranges[stage], self.num_train_timesteps, dtype=torch.float64)

    def timestep(self, stage: int, t: float) -> float:
        first, last = self._ranges[stage]
        return first + (last - first) * t / self.last_t

    def times(self, stage: int, steps: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """Euler steps of one stage: (timesteps (steps,), t (steps + 1,) with a final 1), both float64.

        The grid ends at 0.999, so with shift 1 the last step is only 0.001 wide: released behaviour.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1 in every stage.")
        if shift <= 0:
            raise ValueError(f"shift={shift} must be positive.")
        t = torch.linspace(0, self.last_t, steps, dtype=torch.float64)
        t = t / (shift + (1 - shift) * t)
        first, last = self._ranges[stage]
        return first + (last - first) * t / self.last_t, F.pad(t, (0, 1), value=1.0)

    def sigma(self, timestep: float) -> float:
        return 1 - timestep / self.num_train_timesteps

    def locate(self, sigma: float) -> tuple[int, float, float]:
        """The (stage, t, timestep) that a sigma names. One within rounding (1e-6) of a stage's start is it."""
        timestep = (1 - float(sigma)) * self.num_train_timesteps
        stage = max(k for k in range(self.num_stages) if k == 0 or timestep > self.first_timestep[k] - 1e-3)
        first, last = self._ranges[stage]
        if abs(timestep - first) < 1e-3:
            timestep = first
        return stage, (timestep - first) / (last - first) * self.last_t, timestep

    def denoised(self, x: Tensor, velocity: Tensor, stage: int, t: float) -> Tensor:
        """Estimate of the clean sample at the stage's resolution; exact when halving and doubling it loses nothing."""
        return x + velocity * self._reach(stage, t)

    def velocity(self, x: Tensor, denoised: Tensor, stage: int, t: float) -> Tensor:
        """The inverse of `denoised`."""
        return (denoised - x) / self._reach(stage, t)

    def _reach(self, stage: int, t: float) -> float:
        # The state is tau * sample + (1 - tau) * noise with tau going from s to e at the speed e - s.
        s, e = self.start[stage], self.end[stage]
        return (1 - s - (e - s) * t) / (e - s)


# --- Guidance

def guidance_scales(policy: str, cfg: float, num_stages: int, custom: Sequence[float] | None = None) -> list[float]:
    """The scale of classifier-free guidance in each stage; 1 means that the unconditional pass is not needed.

    policy: "constant", cfg everywhere (text-conditional release); "scaled", 1 + (cfg - 1) * (0, 1/6, 2/3, 1)[stage]
    (class-conditional release; more than four stages spread the same curve); "custom", the given list.
    """
    if policy == "constant":
        return [float(cfg)] * num_stages
    if policy == "scaled":
        return [1 + (cfg - 1) * _class_share(k, num_stages) for k in range(num_stages)]
    if policy == "custom":
        if custom is None or len(custom) != num_stages:
            raise ValueError(f"Custom guidance needs one number for each of the {num_stages} stages, got "
                             f"{0 if custom is None else len(custom)}.")
        return [float(g) for g in custom]
    raise ValueError(f"Guidance policy {policy!r} is not one of constant, scaled, custom.")


def _class_share(stage: int, num_stages: int) -> float:
    if num_stages <= len(CLASS_GUIDANCE):  # by index, as the reference does: three stages end at 2/3
        return CLASS_GUIDANCE[stage]
    place = stage / (num_stages - 1) * (len(CLASS_GUIDANCE) - 1)
    low = min(int(place), len(CLASS_GUIDANCE) - 2)
    return CLASS_GUIDANCE[low] + (CLASS_GUIDANCE[low + 1] - CLASS_GUIDANCE[low]) * (place - low)


# --- Schedules

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


@dataclass(frozen=True)
class Schedule:
    stages: Stages
    plans: tuple[StagePlan, ...]
    solver: str = "euler"
    """"euler"; "dopri5": adaptive, the plan's grid only sets where progress is reported; "dopri5_reference": the same
    with the reference's last step, which runs past the stage and is interpolated back."""
    enter_next: bool = False
    """Finish with the jump into the stage after the last plan: another sampler continues there."""
    clean: bool = False
    """Finish with the clean estimate, because the last plan does not end at the full sample."""

    def __post_init__(self):
        if not self.plans:
            raise ValueError("A schedule needs at least one step.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} is not one of {', '.join(SOLVERS)}.")

    @property
    def steps(self) -> int:
        return sum(plan.steps for plan in self.plans)

    @classmethod
    def build(
        cls,
        stages: Stages,
        steps: Sequence[int] | int,
        shift: Sequence[float] | float = 1.0,
        guidance: Sequence[float] | float = 1.0,
        solver: str = "euler",
        start_stage: int = 0,
        end_stage: int | None = None,
    ) -> Schedule:
        """Schedule of whole stages, start_stage to end_stage (default: the last). Lists have one entry per stage."""
        last = stages.num_stages - 1
        end_stage = last if end_stage is None else end_stage
        if not 0 <= start_stage <= end_stage <= last:
            raise ValueError(f"Stages {start_stage} to {end_stage} are not in order inside 0 to {last}.")
        steps, shift, guidance = (
            _per_stage(name, value, stages.num_stages)
            for name, value in (("steps", steps), ("shift", shift), ("guidance", guidance))
        )
        plans = []
        for k in range(start_stage, end_stage + 1):
            timesteps, times = stages.times(k, int(steps[k]), shift[k])
            plans.append(StagePlan(k, tuple(timesteps.tolist()), tuple(times.tolist()), float(guidance[k])))
        return cls(stages, tuple(plans), solver, clean=end_stage < last)

    def sigmas(self) -> Tensor:
        """The whole schedule as ComfyUI's SIGMAS: one sigma per step, high to low, and a final 0. float32"""
        return torch.tensor([*(self.stages.sigma(T) for plan in self.plans for T in plan.timesteps), 0.0])

    @classmethod
    def from_sigmas(
        cls, stages: Stages, sigmas: Tensor, guidance: Sequence[float] | float = 1.0, solver: str = "euler"
    ) -> Schedule:
        """The schedule that `sigmas` stand for, which may be a part of one cut off anywhere.

        A final 0 finishes the last stage (and the sample, cleanly, if that stage is not the last of the cascade); any
        other last value is where the state is handed over to the next sampler.
        """
        values = [float(s) for s in sigmas]
        if len(values) < 2 or any(a <= b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"PixelFlow's sigmas must fall from step to step, got {values}.")
        guidance = _per_stage("guidance", guidance, stages.num_stages)
        points = [stages.locate(s) for s in values[:-1]]
        last_stage, last_t, _ = (stages.num_stages, 0.0, None) if values[-1] == 0 else stages.locate(values[-1])
        plans = []
        for k in sorted({stage for stage, _, _ in points}):
            inside = [(t, T) for stage, t, T in points if stage == k]
            stop = last_t if last_stage == k else 1.0
            plans.append(
                StagePlan(k, tuple(T for _, T in inside), (*(t for t, _ in inside), stop), float(guidance[k]))
            )
        for before, after in zip(plans, plans[1:], strict=False):
            if after.stage != before.stage + 1 or after.times[0] != 0:
                raise ValueError(f"PixelFlow's sigmas go from stage {before.stage} to stage {after.stage} at t="
                                 f"{after.times[0]:.3f}: every stage must be entered at its start, in order.")
        final, to_zero = plans[-1].stage, values[-1] == 0
        enter_next = not to_zero and last_stage == final + 1
        if not to_zero and last_stage != final and (last_stage, last_t) != (final + 1, 0.0):
            raise ValueError(f"PixelFlow's sigmas stop inside stage {last_stage} without a step in it.")
        return cls(stages, tuple(plans), solver, enter_next, clean=to_zero and final < stages.num_stages - 1)


def _per_stage(name: str, value: Sequence[float] | float, num_stages: int) -> list[float]:
    if isinstance(value, int | float):
        return [value] * num_stages
    if len(value) < num_stages:
        raise ValueError(f"{name} has {len(value)} entries for {num_stages} stages: give one number, or one per stage.")
    return list(value[:num_stages])


# --- Resolutions and noise

def stage_size(height: int, width: int, stage: int, num_stages: int) -> tuple[int, int]:
    """Size of a stage, in the units of the full size."""
    factor = 2 ** (num_stages - 1 - stage)
    if height % factor or width % factor:
        raise ValueError(f"{width}x{height} cannot be halved {num_stages - 1 - stage} times.")
    return height // factor, width // factor


def block_noise(
    shape: Sequence[int], generator: torch.Generator | None = None, device=None, gamma: float = -1 / 3
) -> Tensor:
    """Noise of unit variance whose four values in every 2x2 block have the correlation gamma. (B, C, H, W) float32

    Closed form of the reference's draw per block: the deviation from the block's mean and that mean are scaled by the
    square roots of the two eigenvalues of (1 - gamma + eps) I + gamma J. It is drawn on the generator's device, so
    that the numbers do not depend on `device`, where it is wanted.
    """
    z = torch.randn(shape, generator=generator, device=device if generator is None else generator.device)
    mean = double(F.avg_pool2d(z, 2))
    noise = math.sqrt(1 - gamma + NOISE_EPS) * (z - mean) + math.sqrt(1 + 3 * gamma + NOISE_EPS) * mean
    return noise.to(device)


def block_noise_reference(
    shape: Sequence[int], generator: torch.Generator | None = None, device=None, gamma: float = -1 / 3
) -> Tensor:
    """The same distribution, number for number as the reference draws it: four scalars per block from the CPU stream.

    Slow (a million draws at 1024 px); for repeating published seeds.
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"The reference draws its noise on the CPU, this generator is one of {generator.device}: give "
                         "block_noise_reference a torch.Generator() of the CPU, and `device` for where the noise goes.")
    B, C, H, W = shape
    # Fewer than 16 values a call keep torch on its scalar path, whose stream does not depend on the size of the call.
    blocks = B * C * (H // 2) * (W // 2)
    z = torch.cat([torch.randn(4 * min(3, blocks - i), generator=generator) for i in range(0, blocks, 3)])
    return correlate(z.view(-1, 4), shape, block_covariance(gamma)).to(device)


def block_covariance(gamma: float = -1 / 3, eps: float = NOISE_EPS) -> Tensor:
    """(4, 4): 1 on the diagonal, gamma beside it; eps keeps it positive definite."""
    return (1 - gamma + eps) * torch.eye(4) + gamma * torch.ones(4, 4)


def correlate(z: Tensor, shape: Sequence[int], covariance: Tensor) -> Tensor:
    """White z (blocks, 4), blocks ordered (b c h w), through the Cholesky factor of a block's covariance."""
    B, C, H, W = shape
    noise = z @ torch.linalg.cholesky(covariance).T
    return noise.view(B, C, H // 2, W // 2, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(B, C, H, W)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour, (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def jump(x: Tensor, stage: int, noise: Tensor, stages: Stages) -> Tensor:
    """State at the start of `stage` from x, that at the end of the stage before; twice the resolution."""
    alpha, beta = stages.jump(stage)
    return alpha * double(x) + beta * noise.to(x)


# --- Sampling

@dataclass(frozen=True)
class Progress:
    """Progress that the callback is given after each step."""

    step: int
    """Index over the whole schedule."""
    steps: int
    stage: int
    x: Tensor
    denoised: Tensor


Predict = Callable[[Tensor, float, int, float], Tensor]
"""(x, timestep, stage, cfg) -> velocity, guidance already applied."""


def sample(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    block_noise: Callable[[int, torch.Size], Tensor],
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Run the schedule from x, the state at its first point; white noise when that is the start of stage 0.

    block_noise(stage, shape) gives the noise of the jump into a stage. Returns the final state: the sample at the end
    of the cascade, the clean estimate for a schedule that ends early (`Schedule.clean`), or the state to hand over.
    """
    stages, done = schedule.stages, 0
    solve = SOLVERS[schedule.solver]
    clean = x
    for n, plan in enumerate(schedule.plans):
        if n:
            x = jump(x, plan.stage, block_noise(plan.stage, _doubled(x.shape)), stages)

        def report(step, x, velocity, t, plan=plan, done=done):
            nonlocal clean
            clean = stages.denoised(x, velocity, plan.stage, t)
            if callback is not None:
                callback(Progress(done + step, schedule.steps, plan.stage, x, clean))

        x = solve(predict, x, plan, stages, report)
        done += plan.steps
    if schedule.enter_next:
        stage = schedule.plans[-1].stage + 1
        return jump(x, stage, block_noise(stage, _doubled(x.shape)), stages)
    return clean if schedule.clean else x


def _doubled(shape: torch.Size) -> torch.Size:
    return torch.Size((*shape[:-2], shape[-2] * 2, shape[-1] * 2))


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


# --- Training

def assign_stages(
    batch: int, num_stages: int, rng: torch.Generator, weights: Sequence[float] | None = None
) -> Tensor:
    """A stage for each picture of a batch, (batch,) int64 in random order.

    Without weights, near-equal counts as in the reference (data_in1k.py); with weights, counts in proportion.
    """
    if weights is None:
        stage = torch.arange(batch) % num_stages
    else:
        share = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        place = (torch.arange(batch) + torch.rand(1, generator=rng, dtype=torch.float64)) / batch
        stage = torch.searchsorted(share / share[-1], place, right=True).clamp(max=num_stages - 1)
    return stage[torch.randperm(batch, generator=rng)]


def shrink(images: Tensor, stage: int, num_stages: int) -> Tensor:
    """Full-size pictures at the resolution of a stage: means over blocks."""
    return F.avg_pool2d(images, 2 ** (num_stages - 1 - stage))


def training_pair(images: Tensor, stage: int, t: Tensor, noise: Tensor, stages: Stages) -> tuple[Tensor, Tensor]:
    """(x_t, target velocity) of a stage.

    images: (B, C, H, W) at the resolution of the stage, in [-1, 1]; t: (B,) in [0, 1]; noise: like images, the same
    for both ends. The target is end - start.
    """
    end = torch.lerp(noise, images, stages.end[stage])
    start = torch.lerp(noise, double(F.avg_pool2d(images, 2)), stages.start[stage]) if stage else noise
    return torch.lerp(start, end, t.view(-1, 1, 1, 1).to(images)), end - start


def patches(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B*N, C*p*p), rows ordered (c ph pw), the layout of `PixelFlow.forward_packed`."""
    B, C, H, W = x.shape
    p = patch_size
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B * (H // p) * (W // p), C * p * p)


@dataclass(frozen=True)
class PackedBatch:
    """Pictures of all stages as one sequence, the highest resolution first, as `PixelFlow.forward_packed` takes it."""

    x: Tensor  # (N, C*p*p) noisy
    target: Tensor  # (N, C*p*p) velocity
    timestep: Tensor  # (S,)
    layout: PackedLayout
    order: Tensor  # (S,) index of each item in the unpacked batch


def pack(
    images: Tensor,
    stage: Tensor,
    t_index: Tensor,
    noise: Callable[[int, torch.Size], Tensor],
    stages: Stages,
    patch_size: int,
    context_lengths: Sequence[int] | None = None,
) -> PackedBatch:
    """Noise a batch and pack it (data_in1k.py, collate).

    images: (B, C, H, W) at full size; stage, t_index: (B,), t_index in [0, num_train_timesteps); noise(stage, shape) ->
    noise of the stage's pictures in batch order; context_lengths: text tokens of each picture.
    """
    grid_t = torch.arange(stages.num_train_timesteps) / stages.num_train_timesteps
    rows, targets, timesteps, grids, order = [], [], [], [], []
    for k in reversed(range(stages.num_stages)):
        items = (stage == k).nonzero().flatten()
        if not len(items):
            continue
        small = shrink(images[items], k, stages.num_stages)
        index = t_index[items]
        x, target = training_pair(small, k, grid_t[index].to(small), noise(k, small.shape), stages)
        rows.append(patches(x, patch_size))
        targets.append(patches(target, patch_size))
        timesteps.append(stages.train_timesteps(k)[index].float())
        grids += [(small.shape[-2] // patch_size, small.shape[-1] // patch_size)] * len(items)
        order.append(items)
    order = torch.cat(order)
    lengths = None if context_lengths is None else tuple(int(context_lengths[i]) for i in order)
    return PackedBatch(
        torch.cat(rows), torch.cat(targets), torch.cat(timesteps).to(images.device),
        PackedLayout(tuple(grids), lengths), order,
    )


def packed_loss(velocity: Tensor, target: Tensor, layout: PackedLayout) -> Tensor:
    """Squared error, mean over the tokens of each item: (S,). Every picture weighs the same whatever its stage."""
    rows = (velocity.float() - target.float()).square().mean(dim=-1)  # (N,)
    return torch.stack([part.mean() for part in rows.split(layout.lengths)])
