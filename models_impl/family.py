"""What a family is to nodes and trainer alike: how noise goes onto a clean sample, what the network is to predict of
it, and the way back. No network, no ComfyUI.

| class, in the family's `sampling` | time                               | plan                                     |
| --------------------------------- | ---------------------------------- | ---------------------------------------- |
| `pixart.PixArtDiffusion`          | timestep, fractional when it draws | list of timesteps                        |
| `flux.RectifiedFlow`              | sigma in [0, 1]                    | list of sigmas                           |
| `ultrapixel.CosineDiffusion`      | t in [0, 1]                        | logsnr of each step, a tensor            |
| `pixelflow.CascadeFlow`           | a stage, and t in [0, 1] inside it | `CascadeSchedule`, its stages one by one |

Where a family does not fit, its class says how: PixArt's `sample` is given eps whatever the network predicts,
PixelFlow's pictures have the sizes of their stages, UltraPixel draws in two passes of which `sample` is one.
PixelPonder has FLUX's; ComfyUI draws with both by core's own samplers, so that `RectifiedFlow` is the trainer's only.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .objective.loss import RELEASED, Objective
from .objective.timesteps import TimestepDraws

Time = TypeVar("Time")
Plan = TypeVar("Plan", contravariant=True)

Noise = Callable[[int, torch.Size], Tensor]
"""(index of the step, or of the stage that is entered, shape) -> noise."""
Callback = Callable[[int, Tensor, Tensor], None]
"""(index of the step, x, denoised), once per step; x is the state that the estimate was made from."""


class Diffusion(Protocol[Time, Plan]):
    """Tensors are (B, C, H, W), clean and noise of one shape."""

    def draw(self, batch: int, rng: torch.Generator, draws: TimestepDraws | None = None) -> Time:
        """A time for each picture of a training batch, as the release draws them, or from other noise levels."""

    def network_timestep(self, time: Time) -> Tensor:
        """What the network is conditioned on at these times, (B,)."""

    def add_noise(self, clean: Tensor, noise: Tensor, time: Time) -> Tensor:
        """The state of clean samples at a time."""

    def target(self, clean: Tensor, noise: Tensor, time: Time) -> Tensor:
        """What the network is to predict there."""

    def denoised(self, x: Tensor, prediction: Tensor, time: Time) -> Tensor:
        """The estimate of the clean sample that a prediction at the state x implies; `target` gives the sample."""

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Time, objective: Objective = RELEASED,
             cells: Tensor | None = None) -> Tensor:
        """The error of each picture, (B,) float32; training takes the mean, perhaps with weights. cells: what each cell
        counts, (B, 1, h, w), of a mask."""

    def sample(self, predict: Callable[..., Tensor], x: Tensor, plan: Plan, noise: Noise,
               callback: Callback | None = None) -> Tensor:
        """From the state x at the beginning of a plan to its end. predict(x, timestep, ...) -> prediction, guidance
        inside; noise: asked for by what is random on the way."""
