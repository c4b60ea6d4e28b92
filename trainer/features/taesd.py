"""A small autoencoder of pictures that ComfyUI's core loads as it is: TAESD's network, 2.4 million parameters, eight
pixels along a side of a latent cell. (madebyollin/taesd; comfy/taesd/taesd.py of ComfyUI 0.3.75; AutoencoderTiny of
diffusers.)

Of all VAEs of pictures that core recognises by their keys it is the only small one, because core asks no file for the
widths of an AutoencoderKL. Its file says by vae_scale and vae_shift how its own latents become those that a family
reads.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ...models_impl import state_dict
from ...models_impl.annotators.hed import HED

FACTOR = 8  # pixels along a side of a latent cell
MARK = "taesd_decoder.1.weight"  # by which core knows it
PARTS = {"taesd_encoder": ("encoder", 0), "taesd_decoder": ("decoder", 1)}  # core counts the decoder's clamp as a layer


class Taesd(nn.Module):
    """Pictures and latents in the units of a VAE: what a family multiplies with its latent_scale.

    scale, shift: latent = shift + own / scale, where `own` is what the network itself says.
    """

    def __init__(self, latent_channels: int = 4):
        from ..libraries import hide_broken_torchvision

        hide_broken_torchvision()
        from diffusers import AutoencoderTiny

        super().__init__()
        self.net = AutoencoderTiny(latent_channels=latent_channels)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def encode(self, pictures: Tensor):
        """(B, 3, H, W) in [-1, 1] -> .latents (B, C, H/8, W/8)"""
        return SimpleNamespace(latents=self.net.encode(pictures).latents / self.scale + self.shift)

    def decode(self, latents: Tensor):
        """The way back, .sample, not clamped."""
        return self.net.decode((latents - self.shift) * self.scale)


@torch.no_grad()
def initialise(net: nn.Module):
    """A start at which pictures get through: convolutions keep the variance (He, arXiv 1502.01852, eq. 10), but the
    last of every residual block begins at zero. PyTorch's own start brings latents of size 0.03 under the noise."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(getattr(module, "conv", None), nn.Sequential):  # a residual block
            nn.init.zeros_(module.conv[-1].weight)


def to_core(net: nn.Module, scale: float, shift: float) -> dict[str, Tensor]:
    """The file of an AutoencoderTiny as core's Load VAE takes it."""
    tensors = {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}
    for theirs, (ours, first) in PARTS.items():
        for key, value in getattr(net, ours).layers.state_dict().items():
            number, _, rest = key.partition(".")
            tensors[f"{theirs}.{int(number) + first}.{rest}"] = value
    return tensors


def from_core(tensors: Mapping[str, Tensor], what: str) -> Taesd:
    """From such a file. Raises ValueError where weights are missing or of another shape."""
    found = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part in PARTS:
            ours, first = PARTS[part]
            number, _, rest = rest.partition(".")
            found[f"net.{ours}.layers.{int(number) - first}.{rest}"] = value.float()
    module = Taesd(tensors[MARK].shape[1])
    found["scale"], found["shift"] = (tensors.get(f"vae_{name}", default).float()
                                      for name, default in (("scale", module.scale), ("shift", module.shift)))
    state_dict.load_into(module, found, what)
    return module


def read_decoder(path: Path, latent_scale: float) -> Taesd:
    """The half of a TAESD that draws, from a file of ours or core's, of diffusers (or its folder), or of only the
    decoder (madebyollin/taesd: taesd_decoder). latent_scale: of the family that it was made for, whose latents it reads
    unless the file says otherwise. Raises ValueError for another file."""
    path = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    tensors = state_dict.read_file(path)[0]
    kinds = {MARK: ("taesd_decoder.", 1), "decoder.layers.0.weight": ("decoder.layers.", 0), "1.weight": ("", 1)}
    mark = next((key for key in kinds if key in tensors), None)
    if mark is None:
        raise ValueError(f"{path.name} is no TAESD: its first keys are {', '.join(list(tensors)[:3])}.")
    prefix, first = kinds[mark]
    found = {}
    for key, value in tensors.items():
        number, _, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and number.isdigit():
            found[f"{int(number) - first}.{rest}"] = value.float()
    module = Taesd(tensors[mark].shape[1])
    module.net.encoder = nn.Identity()
    state_dict.load_into(module.net.decoder.layers, found, f"TAESD's decoder ({path.name})")
    for name, default in (("scale", latent_scale), ("shift", 0.0)):
        getattr(module, name).fill_(float(tensors.get(f"vae_{name}", default)))
    return module


def metadata(latent_channels: int) -> dict[str, str]:
    return state_dict.config_metadata("autoencoder", {"latent_channels": latent_channels})


def perceived(hed: HED, one: Tensor, other: Tensor) -> Tensor:
    """How differently HED's five VGG blocks see two pictures, (B,): of features brought to length 1, as LPIPS does
    (arXiv 1801.03924, eq. 1) with all its channel weights 1. one, other: (B, 3, H, W) in [0, 1], at least 16 pixels."""
    x, total = torch.cat([one, other]) * 255 - hed.norm.to(one), 0.0
    for n in range(1, len(hed.config.channels) + 1):
        if n > 1:
            x = nn.functional.max_pool2d(x, 2)
        x, _ = getattr(hed, f"block{n}")(x)
        a, b = nn.functional.normalize(x, dim=1).chunk(2)
        total = total + (a - b).square().sum(1).flatten(1).mean(1)
    return total


def mean_of_processes(value: Tensor) -> Tensor:
    """Mean over the processes of a number that each has of its equal part of a batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()
