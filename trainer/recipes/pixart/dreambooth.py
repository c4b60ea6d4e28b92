"""DreamBooth (arXiv 2208.12242) on PixArt: a few pictures of one subject under a rare word, and beside them pictures of
its class, so that the class stays what it was. A LoRA, or all weights.

data.path has the pictures of the subject and data.caption their caption ("a photo of sks dog"); data.prior_path and
data.prior_caption those of the class. Without prior pictures this is the release's own script.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...config import Config
from ...data import loader
from ...memory import quantization
from .. import adapters
from . import settings, start, task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "pixart_dreambooth"
    lora: bool = True
    """Train the adapter of [adapter]. false: all weights, as the release's script."""
    prior_weight: float = 1.0
    """What the mean loss of the class pictures counts beside that of the subject's."""
    dropout: float = 0.0
    """How often a picture's caption is taken away."""
    variance: float = 0.0
    """Weight of the variance's part of the loss."""
    snr_gamma: float = 0.0
    """Weigh the error by Min-SNR (arXiv 2303.09556) with this gamma; 0 = not."""


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae", "adapter", "memory.base")
    groups, described, buckets = task.groups, task.described, task.bucket_lines
    compile_blocks, activation_bytes = task.compile_blocks, task.activations
    sample, network = task.sample, task.network

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        if self.settings.lora:
            base = start.frozen(start.opened(config, text), config)
            self.net = quantization.frozen(adapters.attach(base, config.adapter, task.TARGETS), config)
        else:
            self.net = start.opened(config, text, network)
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.denoising = task.Denoising(config, self.net, text, *self.encoders)
        group = config.data.bucket_group or config.batch_size
        self.prior_share = loader.priors(group, config.data.prior_share) / group if config.data.prior_path else 0.0

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [task.frozen_vae(config, writer=writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        found = task.problems(config) + task.problems_of_loss(config.recipe) + task.needs_a_start(config)
        return found + (adapters.problems(config.adapter) if config.recipe.lora else [])

    def weights(self, prior: Tensor) -> Tensor:
        """What each picture's loss counts, (B,), so that the mean over a batch is the mean over the subject's pictures
        plus prior_weight times that over the class's. prior: (B,) bool."""
        if not self.prior_share:
            return torch.ones(len(prior))
        own, of_class = 1 / (1 - self.prior_share), self.settings.prior_weight / self.prior_share
        return torch.where(prior, of_class, own)

    def losses(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """(error, bound of the variance), (B,) each."""
        d, s = self.denoising, self.settings
        with d.autocast():
            step = d.noising(batch, timestep, dropped, seed)
            return d.losses(self.net, step, s.variance, snr_gamma=s.snr_gamma)

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        d = self.denoising
        loss = sum(self.losses(batch, *d.drawn(batch, self.settings.dropout), d.seed))
        return loss * self.weights(batch.prior).to(loss)

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(self.losses, batches)

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        if self.settings.lora:
            return {"loras/{name}.safetensors": task.lora_file(self.net)}
        return task.net_files(self)
