"""How differently two latents look: drawn by a TAESD, seen by LPIPS, as DMD's regression is measured.
(train_scripts/train_pixart_dmd.py of PixArt-alpha/PixArt-sigma@1ce521a)"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl import state_dict
from ....models_impl.annotators import hed
from ...features import taesd

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # of VGG-16: width, convolutions
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for pictures in [-1, 1]


class Lpips(nn.Module):
    """LPIPS of VGG-16 (arXiv 1801.03924, eq. 1), version 0.1. Keys: features.N, as torchvision counts a vgg16's, and
    heads.N.

    Not the package's own module, which imports torchvision, and fails with one of another torch. (lpips/lpips.py 0.1.4)
    """

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        self.ends = []  # the last layer of each block
        for width, convolutions in BLOCKS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width, _ in BLOCKS)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] each, at least 16 pixels along a side -> (B,)"""
        x, total = torch.cat([one, other]), 0.0
        x = (x - x.new_tensor(MEAN).view(1, 3, 1, 1)) / x.new_tensor(DEVIATION).view(1, 3, 1, 1)
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in self.ends:
                a, b = F.normalize(x, dim=1, eps=1e-10).chunk(2)
                total = total + self.heads[self.ends.index(n)]((a - b).square()).flatten(1).mean(1)
        return total


def read_lpips(vgg: Path, heads: Path) -> Lpips:
    """From torchvision's vgg16 and the linear heads of the package lpips. Raises ValueError where they are not that."""
    backbone, linear = state_dict.read_file(vgg)[0], state_dict.read_file(heads)[0]
    found = {key: value for key, value in backbone.items() if key.startswith("features.")}
    for n in range(len(BLOCKS)):
        if (key := f"lin{n}.model.1.weight") in linear:
            found[f"heads.{n}.weight"] = linear[key]
    net = Lpips()
    state_dict.load_into(net, found, f"LPIPS of torchvision's vgg16 ({vgg.name}) and lpips' heads ({heads.name})")
    return net


class Judge(nn.Module):
    """How differently two latents look, in float32; nothing in it learns."""

    def __init__(self, decoder: taesd.Taesd, eye: Lpips | hed.HED, latent_scale: float):
        super().__init__()
        self.decoder, self.eye, self.latent_scale = decoder, eye, latent_scale
        self.eval().requires_grad_(False)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Latents (B, C, h, w) times latent_scale -> (B,). Only `found` gets a gradient."""
        with torch.autocast(found.device.type, enabled=False):
            with torch.no_grad():
                other = self.pictures(wanted)
            one = self.pictures(found)
            if isinstance(self.eye, Lpips):
                return self.eye(one, other)
            return taesd.perceived(self.eye, (one + 1) / 2, (other + 1) / 2)

    def pictures(self, latent: Tensor) -> Tensor:
        """(B, 3, 8*h, 8*w) in [-1, 1]"""
        return self.decoder.decode(latent.float() / self.latent_scale).sample.clamp(-1, 1)
