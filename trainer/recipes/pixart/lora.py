"""A LoRA or DoRA on a frozen PixArt (arXiv 2106.09685): only the error of the noise, as in the release's scripts.

What is exported loads in our LoRA node and in core's, at the scale it was trained with.
"""
from __future__ import annotations

from torch import nn

from ...config.schema import Config
from .task import PixArtRecipe


class Recipe(PixArtRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text)
        self.net = self.adapted()
        self.prepare()

    files = PixArtRecipe.adapter_files
