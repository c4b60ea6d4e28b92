"""DreamBooth (arXiv 2208.12242) on PixArt: a few pictures of one subject under a rare word, and beside them pictures of
its class, so that the class stays what it was. A LoRA, or all weights.

data.path has the pictures of the subject and data.caption their caption ("a photo of sks dog"); data.prior_path and
data.prior_caption those of the class. Without prior pictures this is the release's own script.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ...config.schema import Config
from ...data import loader
from ..contract import Files
from .start import opened
from .task import PixArtRecipe


class Recipe(PixArtRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text)
        self.net = self.adapted() if self.settings.lora else opened(config, text, network)
        self.prepare()
        group = config.data.bucket_group or config.batch_size
        self.prior_share = loader.priors(group, config.data.prior_share) / group if config.data.has_prior else 0.0

    def weights(self, prior: Tensor) -> Tensor:
        """What each picture's loss counts, (B,), so that the mean over a batch is the mean over the subject's pictures
        plus prior_weight times that over the class's. prior: (B,) bool."""
        if not self.prior_share:
            return torch.ones(len(prior))
        own, of_class = 1 / (1 - self.prior_share), self.settings.prior_weight / self.prior_share
        return torch.where(prior, of_class, own)

    def forward(self, batch) -> Tensor:
        loss = super().forward(batch)
        return loss * self.weights(batch.prior).to(loss)

    def files(self) -> Files:
        return self.adapter_files() if self.settings.lora else super().files()
