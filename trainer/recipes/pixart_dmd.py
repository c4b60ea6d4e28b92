"""Distribution matching distillation of PixArt (arXiv 2311.18828): one step from white noise, as PixArt-alpha-DMD.

Three copies of one network: the student that draws in one step at recipe.timestep, the guided teacher that knows what
is real, and a follower that learns what the student makes. Of the pictures only the captions are read, but for the
sizes. The release's regression on pairs of noise and picture, which needs LPIPS, is not here. (train_pixart_dmd.py)
"""
from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...models_impl.pixart import sampling
from .. import pixart
from ..config import Config
from ..noise import VALIDATION, batch_noise, generator, spread

MATCHED = (20, 980)  # the timesteps at which the distributions are compared (arXiv 2311.18828, section 4)
FOLLOWED = (1, 999)  # and those at which the follower learns
START, RENOISE, FOLLOW = 0, 2, 3  # kinds of noise


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "pixart_dmd"
    timestep: int = sampling.DMD_TIMESTEP
    """Where the student takes its one step; `timestep` of PixArtSigmas in ComfyUI."""
    guidance: float = 3.0
    """cfg of the teacher."""
    follower_rate: float = 1.0
    """Learning rate of the follower, as a multiple of optimizer.rate."""
    dropout: ClassVar[float] = 0.0


class Recipe(nn.Module):
    Settings, Model, sections = Settings, pixart.Model, ("vae",)
    buckets, compile_blocks = pixart.bucket_lines, pixart.compile_blocks
    network, files = pixart.network, pixart.net_files

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        self.net = pixart.opened(config, text, network)
        self.follower = deepcopy(self.net)
        self.teacher = [] if network else [pixart.frozen(deepcopy(self.net), config)]  # in a list: no part of the run
        for net in (self.net, self.follower):
            net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.denoising = pixart.Denoising(config, self.net, text, *self.encoders)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [pixart.frozen_vae(config, writer=writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        found, s = pixart.problems(config) + pixart.needs_a_start(config), config.recipe
        if not 1 <= s.timestep < sampling.TRAIN_TIMESTEPS:
            found.append(f"recipe.timestep={s.timestep} is outside 1 to {sampling.TRAIN_TIMESTEPS - 1}.")
        if not 0 < s.follower_rate:
            found.append(f"recipe.follower_rate={s.follower_rate} must be above 0.")
        return found

    def groups(self, config: Config) -> list[dict]:
        """The gradients of student and follower are clipped each by itself: their losses have nothing in common."""
        follower = [{**g, "rate": self.settings.follower_rate, "clipped": "follower"}
                    for g in pixart.groups_of(follower=self.follower)]
        return pixart.groups_of(net=self.net) + follower

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """For each picture of a whole batch, (B,): the timestep at which the student is judged, and the follower's."""
        rng, B = generator(self.config.seed, step), self.config.batch_size
        return tuple(torch.randint(*span, (B,), generator=rng) for span in (MATCHED, FOLLOWED))

    def described(self, step: int) -> list[str]:
        return [f"judged at timestep {a}, followed at {b}" for a, b in zip(*(t.tolist() for t in self.draw(step)),
                                                                           strict=True)]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return 2 * pixart.activations(self, pictures, cpu)  # student and follower

    def forward(self, batch) -> Tensor:
        """The loss of the student and that of its follower, summed: neither reaches the other's weights."""
        own = slice(batch.positions.start, batch.positions.stop)
        judged, followed = (t[own].to(self.denoising.device) for t in self.draw(batch.step))
        matching, generated, cond = self.matched(batch, judged, self.config.seed)
        d, seed = self.denoising, self.config.seed
        with d.autocast():
            noise = batch_noise(seed, batch.step, batch.positions, generated.shape[1:], d.device, FOLLOW)
            noisy = d.schedule.add_noise(generated.detach(), noise, followed)
            loss = sampling.eps_loss(d.eps(self.follower, noisy, followed, cond), noise)
        return loss + matching.loss

    def matched(self, batch, timestep: Tensor, seed: int) -> tuple[sampling.DmdLoss, Tensor, dict]:
        """(the loss of the student, what it made, the condition of its captions)"""
        d, s, B = self.denoising, self.settings, len(batch.positions)
        shape = (d.shape.in_channels, *(n // pixart.VAE_FACTOR for n in batch.size))
        with d.autocast():
            cond, uncond = (d.condition(captions, None, batch.size, batch.sizes)
                            for captions in (batch.captions, [""] * B))
            start, noise = (batch_noise(seed, batch.step, batch.positions, shape, d.device, kind)
                            for kind in (START, RENOISE))
            first = torch.full((B,), s.timestep, device=d.device)
            generated = d.schedule.denoised(start, d.eps(self.net, start, first, cond), first)
            noisy = d.schedule.add_noise(generated, noise, timestep)
            with torch.no_grad():
                teacher = self.teacher[0] = self.teacher[0].to(d.device)
                real, free = (d.eps(teacher, noisy, timestep, c) for c in (cond, uncond))
                fake = d.eps(self.follower, noisy, timestep, cond)
            return (sampling.dmd_loss(generated, noisy, free + s.guidance * (real - free), fake, timestep, d.schedule),
                    generated, cond)

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """How far the student is from what the teacher makes of it, with fixed noise: a mean absolute difference, for
        the loss itself measures only how far the follower is from the teacher."""
        total = 0.0
        for batch in batches:
            low, high = MATCHED
            timestep = low + spread(batch.positions, high - low).to(self.denoising.device)
            found, generated, _ = self.matched(batch, timestep, VALIDATION)
            total += (generated - found.real_denoised).abs().flatten(1).mean(1).sum().item()
        return {"loss": total / sum(len(b.positions) for b in batches)}

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1], in one step: steps, shift and cfg are not read."""
        d = self.denoising
        return d.sample(self.net, what, height, width, 1, seed,
                        lambda eps, x, noise: sampling.dmd(eps, x, d.schedule, self.settings.timestep))
