"""A LoRA or DoRA on a frozen PixArt (arXiv 2106.09685): the error of the noise alone, as in the release's scripts.

What is exported loads in our LoRA node and in core's, at the scale it was trained with.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...config import Config
from ...memory import quantization
from .. import adapters
from . import settings, start, task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "pixart_lora"
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    variance: float = 0.0
    """Weight of the variance's part of the loss; the release's LoRA scripts leave it out."""
    snr_gamma: float = 0.0
    """Weigh the error by Min-SNR (arXiv 2303.09556) with this gamma, 5 in the paper; 0 = not."""


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae", "adapter", "memory.base")
    groups, described, buckets = task.groups, task.described, task.bucket_lines
    compile_blocks, activation_bytes = task.compile_blocks, task.activations
    sample, network = task.sample, task.network

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        base = start.frozen(start.opened(config, text), config)
        self.net = quantization.frozen(adapters.attach(base, config.adapter, task.TARGETS), config)
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.denoising = task.Denoising(config, self.net, text, *self.encoders)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [task.frozen_vae(config, writer=writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        return (task.problems(config) + task.problems_of_loss(config.recipe) + task.needs_a_start(config)
                + adapters.problems(config.adapter))

    def losses(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """(error, bound of the variance), (B,) each."""
        d, s = self.denoising, self.settings
        with d.autocast():
            step = d.noising(batch, timestep, dropped, seed)
            return d.losses(self.net, step, s.variance, snr_gamma=s.snr_gamma)

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        d = self.denoising
        return sum(self.losses(batch, *d.drawn(batch, self.settings.dropout), d.seed))

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(self.losses, batches)

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        return {"loras/{name}.safetensors": task.lora_file(self.net)}
