"""PixArt, all of its weights (arXiv 2310.00426, 2403.04692): the noise of latents and how uncertain it is.

From a released checkpoint of any resolution, of our own, or from nothing.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...models_impl.pixart import checkpoint
from .. import encoders, pixart
from ..config import Config


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
    Settings, Model = Settings, pixart.Model

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again; without it, [model] and init_from say it."""
        super().__init__()
        self.settings, self.config = config.recipe, config
        self.text = text
        self.net = pixart.opened(config, text, network)
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.denoising = pixart.Denoising(config, self.net, text, *self.encoders)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """What makes features of pictures, and keeps them (`cache`)."""
        return [pixart.frozen_vae(config, writer=writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        return pixart.problems(config) + pixart.problems_of_loss(config.recipe)

    def groups(self, config: Config) -> list[dict]:
        """Parameters that learn, with their rates; the matrices inside blocks are what Muon may train."""
        return pixart.groups({"net": (self.net, 1.0), "text": (self.text, config.text.rate)})

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        d, s = self.denoising, self.settings
        timestep, dropped = d.drawn(batch, s.dropout)
        with d.autocast():
            step = d.noising(batch, timestep, dropped, d.seed)
            return sum(d.losses(self.net, step, s.variance, s.snr_switch, s.snr_gamma))

    def compile_blocks(self):
        for block in self.net.blocks:
            block.compile()

    def described(self, step: int) -> list[str]:
        """What chance decides about each picture of a step's batch, in words."""
        return pixart.described(*self.denoising.draw(step, self.settings.dropout))

    def buckets(self, step: int) -> list[str]:
        return pixart.sizes(self.config, self.net.config)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        c = self.config
        return pixart.activation_bytes(self.net.config, c.data.resolution, pictures, c.precision == "bf16",
                                       c.checkpoint_activations)

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(self.net, batches, self.settings.variance)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1]. shift is PixelFlow's and is not read."""
        return self.denoising.sample(self.net, what, height, width, cfg, seed, self.denoising.solver(steps))

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        found = {"diffusion_models/{name}.safetensors": (self.net.state_dict(), checkpoint.metadata(self.net.config))}
        return found | encoders.files(self.text)
