"""What recipes of autoencoders share: pictures through latents and back, no captions, no classes.

The latent is what the encoder says plus noise of a fixed width, so of what a VAE's bound (arXiv 1312.6114, eq. 10) asks
of latents one term is left that can change: half their square. The exported file scales latents so that the family
which draws them sees unit variance.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...models_impl.annotators import hed
from ..config.schema import Config
from ..data import pictures
from ..features import taesd
from ..training.noise import batch_noise
from ..training.validation import certainty
from .contract import Base

MEMORY = 0.01  # how much of the mean square of latents a pass renews


class Reconstruction(Base):
    """A recipe adds `encode`, `decode`, `factor` and `channels`; [recipe] has noise, kl, features, feature_weight."""

    factor: int
    """Pixels along a side of a latent cell."""
    channels: int
    """Numbers of a latent cell."""

    def __init__(self, config: Config):
        super().__init__()
        self.settings, self.model, self.config, self.text = config.recipe, config.model, config, None
        self.register_buffer("square", torch.ones(()))
        self.hed: list[hed.HED] = []  # in a list: not a part of what is trained or saved
        self.bf16 = config.precision == "bf16"

    def encode(self, shown: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the latent."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, batch) -> Tensor:
        device, s = self.square.device, self.settings
        shown = batch.pictures.to(device).float() / 127.5 - 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            latent = self.encode(shown).float()
            noise = batch_noise(self.config.seed, batch.step, batch.positions, latent.shape[1:], device)
            again = self.decode(latent + s.noise * noise).float()
            with torch.no_grad():
                self.square.lerp_(taesd.mean_of_processes(latent.square().mean()), MEMORY)
            loss = (again - shown).abs().flatten(1).mean(1) + s.kl / 2 * latent.square().flatten(1).mean(1)
            if s.features and s.feature_weight:
                seen = taesd.perceived(self.judge(device), (shown + 1) / 2, (again + 1) / 2)
                loss = loss + s.feature_weight * seen
        return loss

    def judge(self, device) -> hed.HED:
        if not self.hed:
            self.hed.append(hed.load(Path(self.settings.features).expanduser()).to(device))
        return self.hed[0]

    def described(self, step: int) -> list[str]:
        return ["as it is"] * self.config.batch_size

    def buckets(self, step: int) -> list[str]:
        side = self.config.data.resolution
        return [f"{self.config.batch_size} pictures of {side}x{side} pixels, {(side // self.factor) ** 2} latent cells "
                f"of {self.channels} numbers each"]

    @torch.no_grad()
    def again(self, shown: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> the same pictures through latents and back, in [-1, 1]."""
        device = self.square.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.decode(self.encode(shown.to(device).float() / 127.5 - 1)).float().clamp(-1, 1)

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """Mean absolute error of the held-out pictures without noise, and their PSNR in dB."""
        errors, squares = [], []
        for batch in batches:
            away = self.again(batch.pictures) - (batch.pictures.to(self.square.device).float() / 127.5 - 1)
            errors.append(away.abs().flatten(1).mean(1))
            squares.append(away.square().flatten(1).mean(1))
        return {"loss": torch.cat(errors).mean().item(), **certainty(torch.cat(errors)),
                "psnr": (10 * torch.log10(4 / torch.cat(squares).clamp_min(1e-12))).mean().item()}

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """Picture files, each with what becomes of it at its right: (B, 3, H, 2*W) in [-1, 1]. Nothing else is read."""
        shown = torch.stack([pictures.shown(Path(file).expanduser(), height, width) for file in what])
        again = self.again(shown)
        return torch.cat([shown.to(again) / 127.5 - 1, again], dim=3)
