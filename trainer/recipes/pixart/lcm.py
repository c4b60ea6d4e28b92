"""Latent consistency distillation of PixArt (arXiv 2310.04378, 2401.05252): 2 to 8 steps, no guidance.

The student learns to answer alike wherever it is asked along one path of the guided teacher. Of all weights, where the
target is the EMA of the student ([ema]), which is also what is exported; or as a LoRA, whose target is the
student itself and whose teacher is the network without the LoRA. (train_pixart_lcm.py, train_pixart_lcm_lora.py)
"""
from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from ....models_impl.pixart import sampling
from ...config.schema import Config
from ...training.noise import VALIDATION, batch_noise, generator, spread
from ...training.validation import certainty
from .. import adapters
from ..contract import Files
from .start import frozen, opened
from .task import PixArtRecipe


class Recipe(PixArtRecipe):
    algorithm = "lcm"

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text)
        if self.settings.lora:
            self.net = self.adapted()
        else:
            self.net = opened(config, text, network)
            # A run that is opened again only draws.
            self.teacher = [] if network else [frozen(deepcopy(self.net), config)]
        self.prepare()
        self.grid = sampling.LcmGrid(self.denoising.schedule, self.settings.grid)

    def draw(self, step: int) -> Tensor:
        """The index on the grid of each picture of a whole batch, (B,)."""
        return torch.randint(self.grid.steps, (self.config.batch_size,), generator=generator(self.config.seed, step))

    def described(self, step: int) -> list[str]:
        start, end = self.grid.pair(self.draw(step))
        return [f"timestep {a} to {b}" for a, b in zip(start.tolist(), end.tolist(), strict=True)]

    def forward(self, batch) -> Tensor:
        """The mean over this pass, for all of its pictures."""
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
                latent, noise, index, self.grid, s.guidance, s.distance, s.huber_c,
            )

    def taught(self, x: Tensor, timestep: Tensor, condition: dict) -> Tensor:
        if self.settings.lora:
            with adapters.without(self.net):
                return self.denoising.eps(self.net, x, timestep, condition)
        teacher = self.teacher[0] = self.teacher[0].to(x.device)
        return self.denoising.eps(teacher, x, timestep, condition)

    def target(self, x: Tensor, timestep: Tensor, condition: dict) -> Tensor:
        d = self.denoising
        if self.settings.lora or self.ema is None:
            return d.eps(self.net, x, timestep, condition)
        # Autocast keeps what it has cast of the student, by parameter, and would use it in place of the EMA.
        with self.ema.applied(), torch.autocast(d.device.type, torch.bfloat16, d.bf16, cache_enabled=False):
            return d.eps(self.net, x, timestep, condition)

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """The same loss at fixed indices with fixed noise; the EMA weights are in place already, and so is the
        target."""
        ema, self.ema = self.ema, None
        found = [self.distilled(b, spread(b.positions, self.grid.steps), VALIDATION) for b in batches]
        losses = [one.loss * len(b.positions) for one, b in zip(found, batches, strict=True)]
        self.ema = ema
        return {"loss": (sum(losses) / sum(len(b.positions) for b in batches)).item(),
                **certainty(torch.cat([one.each for one in found]))}

    def timesteps(self, steps: int) -> list[float]:
        return sampling.lcm_timesteps(steps, self.grid.schedule.steps, self.grid.steps)

    def files(self) -> Files:
        return self.adapter_files() if self.settings.lora else super().files()
