"""Latent consistency distillation of PixArt (arXiv 2310.04378, 2401.05252): 2 to 8 steps, no guidance.

The student learns to answer alike wherever it is asked along one path of the guided teacher. Of all weights, where the
target is the moving average [ema] of the student, which is also what is exported; or as a LoRA, whose target is the
student itself and whose teacher is the network without the LoRA. (train_pixart_lcm.py, train_pixart_lcm_lora.py)
"""
from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....models_impl.pixart import sampling
from ...config import Config
from ...memory import quantization
from ...training.noise import VALIDATION, batch_noise, generator, spread
from .. import adapters
from . import settings, task
from .start import frozen, opened


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "pixart_lcm"
    lora: bool = True
    """Train the adapter of [adapter] (LCM-LoRA). false: all weights."""
    guidance: float = 4.5
    """The teacher is guided by 1 + this."""
    grid: int = 50
    """So many timesteps of the 1000 are taught."""
    distance: str = "huber"
    """huber or l2."""
    huber_c: float = sampling.HUBER_C
    dropout: ClassVar[float] = 0.0


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae", "adapter", "memory.base")
    groups, buckets, compile_blocks = task.groups, task.bucket_lines, task.compile_blocks
    activation_bytes, network = task.activations, task.network

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        self.average = None  # the loop's, of which the target is made
        if self.settings.lora:
            base = frozen(opened(config, text), config)
            self.net = quantization.frozen(adapters.attach(base, config.adapter, task.TARGETS), config)
        else:
            self.net = opened(config, text, network)
            # A run that is opened again only draws. In a list: no part of what is trained, saved or averaged.
            self.teacher = [] if network else [frozen(deepcopy(self.net), config)]
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.denoising = task.Denoising(config, self.net, text, *self.encoders)
        self.grid = sampling.LcmGrid(self.denoising.schedule, self.settings.grid)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [task.frozen_vae(config, writer=writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        found, s = task.problems(config) + task.needs_a_start(config), config.recipe
        if s.distance not in ("huber", "l2"):
            found.append(f"recipe.distance={s.distance!r} is none of huber, l2.")
        if not 1 <= s.grid <= sampling.TRAIN_TIMESTEPS:
            found.append(f"recipe.grid={s.grid} is outside 1 to {sampling.TRAIN_TIMESTEPS}.")
        if not s.lora and not config.ema.decay:
            found.append("ema.decay=0, and the moving average is the target here: the release has 0.95.")
        return found + (adapters.problems(config.adapter) if s.lora else [])

    def draw(self, step: int) -> Tensor:
        """The index on the grid of each picture of a whole batch, (B,)."""
        return torch.randint(self.grid.steps, (self.config.batch_size,), generator=generator(self.config.seed, step))

    def described(self, step: int) -> list[str]:
        start, end = self.grid.pair(self.draw(step))
        return [f"timestep {a} to {b}" for a, b in zip(start.tolist(), end.tolist(), strict=True)]

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,): the mean over this pass for all of them."""
        index = self.draw(batch.step)[batch.positions.start:batch.positions.stop]
        return self.distilled(batch, index, self.config.seed).loss.expand(len(index))

    def distilled(self, batch, index: Tensor, seed: int) -> sampling.LcmStep:
        d, s = self.denoising, self.settings
        with d.autocast():
            latent = d.latents(batch, seed)
            noise = batch_noise(seed, batch.step, batch.positions, latent.shape[1:], d.device)
            cond = d.condition(batch.captions, None, batch.size, batch.sizes)
            uncond = d.condition(batch.captions, torch.ones(len(index), dtype=torch.bool), batch.size, batch.sizes)
            return sampling.lcm_distillation(
                lambda x, t: d.eps(self.net, x, t, cond), lambda x, t: self.taught(x, t, cond),
                lambda x, t: self.taught(x, t, uncond), lambda x, t: self.target(x, t, cond),
                latent, noise, index.to(d.device), self.grid, s.guidance, s.distance, s.huber_c,
            )

    def taught(self, x: Tensor, timestep: Tensor, condition: dict) -> Tensor:
        if self.settings.lora:
            with adapters.without(self.net):
                return self.denoising.eps(self.net, x, timestep, condition)
        teacher = self.teacher[0] = self.teacher[0].to(x.device)
        return self.denoising.eps(teacher, x, timestep, condition)

    def target(self, x: Tensor, timestep: Tensor, condition: dict) -> Tensor:
        d = self.denoising
        if self.settings.lora or self.average is None:
            return d.eps(self.net, x, timestep, condition)
        # Autocast keeps what it has cast of the student, by parameter, and would give it for the average.
        with self.average.applied(), torch.autocast(d.device.type, torch.bfloat16, d.bf16, cache_enabled=False):
            return d.eps(self.net, x, timestep, condition)

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """The same loss at fixed indices with fixed noise; the average is worn already, and so is the target."""
        average, self.average = self.average, None
        losses = [self.distilled(b, spread(b.positions, self.grid.steps), VALIDATION).loss * len(b.positions)
                  for b in batches]
        self.average = average
        return {"loss": (sum(losses) / sum(len(b.positions) for b in batches)).item()}

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1], without guidance: shift and cfg are not read."""
        d = self.denoising

        def walk(eps, x, noise):
            timesteps = sampling.lcm_timesteps(steps, self.grid.steps)
            return sampling.lcm(eps, x, d.schedule, timesteps, lambda index, shape: noise())

        return d.sample(self.net, what, height, width, 1, seed, walk)

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        if self.settings.lora:
            return {"loras/{name}.safetensors": task.lora_file(self.net)}
        return task.net_files(self)
