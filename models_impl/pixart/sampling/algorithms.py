"""The samplers by name, each with what it needs: the one table that the nodes and the trainer draw with."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...family import Callback, Noise
from .ancestral import GUIDED_CHANNELS, iddpm
from .consistency import lcm
from .distribution_matching import dmd
from .dpm_solver import dpm_diffusers, dpm_solver_pp
from .schedule import TRAIN_TIMESTEPS, NoiseSchedule
from .stochastic_adams import sa_solver
from .timesteps import iddpm_timesteps, lcm_timesteps, linspace_timesteps, one_step, time_uniform
from .walk import AfterStep, Predict


@dataclass(frozen=True)
class Algorithm:
    solver: Callable[..., Tensor]
    """(predict, x, schedule, timesteps, callback=, after_step=), and those of `takes` by their names."""
    timesteps: Callable[[int, int], list[float]]
    """(steps, train_steps) -> the list that it is released with."""
    takes: frozenset[str] = frozenset()
    """Those of noise, order and eta that it reads."""
    learned_variance: bool = False
    """Whether predict must give the variance behind the noise."""
    guided: bool = True
    """Whether weights that are made for it are guided when they draw; else guidance is in the weights."""
    guided_channels: int | None = None
    """Channels that guidance moves, see `guided`; None: those of the noise."""
    one_step: bool = False
    """Whether it takes a single step, from white noise of variance 1 whatever its timestep."""

    def sample(
        self,
        predict: Predict,
        x: Tensor,
        schedule: NoiseSchedule,
        timesteps: Sequence[float],
        noise: Noise | None = None,
        order: int = 2,
        eta: float = 1.0,
        callback: Callback | None = None,
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """The state at the last of the timesteps, in x's dtype, from x (B, C, H, W), that at the first.

        noise: asked for in each step of a stochastic sampler; order: of a multistep solver; eta: strength of the noise
        that SA-Solver adds.
        """
        settings = {"noise": noise, "order": order, "eta": eta}
        taken = {name: settings[name] for name in self.takes}
        return self.solver(predict, x, schedule, timesteps, **taken, callback=callback, after_step=after_step)


def _sa_solver(predict, x, schedule, timesteps, noise, order, eta, callback, after_step) -> Tensor:
    return sa_solver(predict, x, schedule, timesteps, noise, order, order, eta, callback, after_step)


def _one_step(steps: int, train_steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """Whatever is asked for."""
    return one_step()


ALGORITHMS = {
    "dpm-solver++": Algorithm(dpm_solver_pp, time_uniform, frozenset({"order"})),
    "dpm-solver++ (diffusers)": Algorithm(dpm_diffusers, linspace_timesteps, frozenset({"order"})),
    "sa-solver": Algorithm(_sa_solver, time_uniform, frozenset({"noise", "order", "eta"})),
    "iddpm": Algorithm(iddpm, iddpm_timesteps, frozenset({"noise"}), learned_variance=True,
                       guided_channels=GUIDED_CHANNELS),
    "lcm": Algorithm(lcm, lcm_timesteps, frozenset({"noise"}), guided=False),
    "dmd": Algorithm(dmd, _one_step, guided=False, one_step=True),
}


def guided(cond: Tensor, uncond: Tensor, cfg: float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance of the first `channels`, or of all; the others stay the prompt's, as in DiT's
    forward_with_cfg. cond, uncond: (B, C, H, W)."""
    prediction = uncond + (cond - uncond) * cfg
    return prediction if channels is None else torch.cat([prediction[:, :channels], cond[:, channels:]], dim=1)
