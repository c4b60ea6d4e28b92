"""A small decoder straight from the latent of Stage C to a picture of eight pixels a cell, for a quick look.

(modules/previewer.py of Stability-AI/StableCascade@7a7d341f, MIT.)
"""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..known_files import WrongFile
from ..state_dict import without_prefix

PIXELS = 8  # along a side of a cell


class Previewer(nn.Module):
    """The previewer's network. Meant for evaluation mode."""

    def __init__(self, latent_channels: int = 16, hidden: int = 512, operations=nn, dtype=None, device=None):
        super().__init__()
        to, parts, D = dict(dtype=dtype, device=device), [], hidden

        def add(layer: nn.Module, channels: int):
            parts.extend((layer, nn.GELU(), nn.BatchNorm2d(channels, **to)))

        add(operations.Conv2d(latent_channels, D, kernel_size=1, **to), D)
        add(operations.Conv2d(D, D, kernel_size=3, padding=1, **to), D)
        for source, target in ((D, D // 2), (D // 2, D // 4), (D // 4, D // 4)):
            add(operations.ConvTranspose2d(source, target, kernel_size=2, stride=2, **to), target)
            add(operations.Conv2d(target, target, kernel_size=3, padding=1, **to), target)
        self.blocks = nn.Sequential(*parts, operations.Conv2d(D // 4, 3, kernel_size=1, **to))

    def forward(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, 8h, 8w), nominally in [0, 1]."""
        return self.blocks(latent)


def read(tensors: Mapping) -> tuple[dict[str, int], dict[str, Tensor]]:
    """(arguments of `Previewer`, weights) of `previewer.safetensors`. Raises ValueError for another file."""
    tensors = without_prefix(tensors)
    first = tensors.get("blocks.0.weight")
    if first is None or "blocks.24.weight" not in tensors:
        raise WrongFile("This is not Stable Cascade's previewer.", tensors)
    return {"latent_channels": first.shape[1], "hidden": first.shape[0]}, tensors
