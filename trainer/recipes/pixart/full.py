"""PixArt, all of its weights (arXiv 2310.00426, 2403.04692): the noise of latents and how uncertain it is.

From a released checkpoint of any resolution, of our own, or from nothing.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...config import Config
from . import settings, start, task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "pixart"
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    variance: float = 1.0
    """Weight of the variance's part of the loss, of networks that predict it; 0 leaves their variance as it is."""
    snr_switch: bool = False
    """Learn the picture instead of the noise up to timestep 249 (snr_loss in the release's configurations)."""
    snr_gamma: float = 0.0
    """Weigh the error by Min-SNR (arXiv 2303.09556) with this gamma, 5 in the paper; 0 = not."""


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae",)
    groups, described, buckets = task.groups, task.described, task.bucket_lines
    compile_blocks, activation_bytes = task.compile_blocks, task.activations
    sample, network = task.sample, task.network
    files = task.net_files

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again; without it, [model] and init_from say it."""
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        self.net = start.opened(config, text, network)
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.denoising = task.Denoising(config, self.net, text, *self.encoders)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [task.frozen_vae(config, writer=writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        return task.problems(config) + task.problems_of_loss(config.recipe)

    def losses(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """(error, bound of the variance), (B,) each."""
        d, s = self.denoising, self.settings
        with d.autocast():
            step = d.noising(batch, timestep, dropped, seed)
            return d.losses(self.net, step, s.variance, s.snr_switch, s.snr_gamma)

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        d = self.denoising
        return sum(self.losses(batch, *d.drawn(batch, self.settings.dropout), d.seed))

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(self.losses, batches)
