"""PixArt, all of its weights (arXiv 2310.00426, 2403.04692): the noise of latents and how uncertain it is.

From a released checkpoint of any resolution, of our own, or from nothing.
"""
from __future__ import annotations

from torch import nn

from ...config.schema import Config
from .start import opened
from .task import PixArtRecipe


class Recipe(PixArtRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text)
        self.net = opened(config, text, network)
        self.prepare()

    def loss_settings(self) -> dict:
        return {**super().loss_settings(), "snr_switch": self.settings.snr_switch}
