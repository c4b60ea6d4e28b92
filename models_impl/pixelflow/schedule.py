"""The steps and the guidance of every stage of a cascade, as plans or as ComfyUI's sigmas."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .solvers import SOLVERS, StagePlan
from .stages import Stages

CLASS_GUIDANCE = (0, 1 / 6, 2 / 3, 1)  # share of (cfg - 1) in each stage, class-conditional


@dataclass(frozen=True)
class CascadeSchedule:
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
    ) -> CascadeSchedule:
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
    ) -> CascadeSchedule:
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


def guidance_scales(policy: str, cfg: float, num_stages: int, custom: Sequence[float] | None = None) -> list[float]:
    """The scale of classifier-free guidance in each stage; 1 means that the unconditional pass is not needed.

    policy: "constant", cfg everywhere (text-conditional release); "scaled", 1 + (cfg - 1) * (0, 1/6, 2/3, 1)[stage]
    (class-conditional release; more than four stages spread the same curve); "custom", the given list.
    """
    if policy not in GUIDANCE:
        raise ValueError(f"Guidance policy {policy!r} is not one of {', '.join(GUIDANCE)}.")
    return GUIDANCE[policy](cfg, num_stages, custom)


def _custom(cfg: float, num_stages: int, scales: Sequence[float] | None) -> list[float]:
    if scales is None or len(scales) != num_stages:
        raise ValueError(f"Custom guidance needs one number for each of the {num_stages} stages, got "
                         f"{0 if scales is None else len(scales)}.")
    return [float(scale) for scale in scales]


GUIDANCE = {  # policy -> fn(cfg, num_stages, custom)
    "constant": lambda cfg, num_stages, custom: [float(cfg)] * num_stages,
    "scaled": lambda cfg, num_stages, custom: [1 + (cfg - 1) * _class_share(k, num_stages) for k in range(num_stages)],
    "custom": _custom,
}


def _class_share(stage: int, num_stages: int) -> float:
    if num_stages <= len(CLASS_GUIDANCE):  # by index, as the reference does: three stages end at 2/3
        return CLASS_GUIDANCE[stage]
    place = stage / (num_stages - 1) * (len(CLASS_GUIDANCE) - 1)
    low = min(int(place), len(CLASS_GUIDANCE) - 2)
    return CLASS_GUIDANCE[low] + (CLASS_GUIDANCE[low + 1] - CLASS_GUIDANCE[low]) * (place - low)
