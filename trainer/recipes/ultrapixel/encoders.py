"""Encoders of pictures, as `features.cache` takes them: Stable Cascade's semantic encoder, CLIP-L's image tower."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl import state_dict
from ....models_impl.ultrapixel import checkpoint, effnet, sampling
from ... import libraries
from ...config.schema import Config
from ...features.precision import DTYPES
from ...features.store import Store, fingerprint
from .networks import read


@dataclass(frozen=True)
class Low:
    """How the low-resolution picture is made of the high-resolution one."""

    side: int = 24
    """Cells along a side, of a square."""
    filter: str = "nearest"
    """nearest, as the release, or antialias."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels, of the area of a square of `side` cells."""
        return sampling.sizes(height, width, low_side=self.side).low_pixels

    def shrink(self, image: Tensor) -> Tensor:
        size = self.size(*image.shape[-2:])
        if self.filter == "nearest":
            return F.interpolate(image, size, mode="nearest")
        return F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1)


class FrozenEffnet:
    """Latents of Stable Cascade's semantic encoder: part "high", and with `low` "low", of the picture made small."""

    name, of = "effnet", ""

    def __init__(self, path: str, precision: str = "fp32", low: Low | None = None, cache: str = "", writer: int = 0):
        self.path, self.dtype, self.low = Path(path).expanduser(), DTYPES[precision], low
        self.store, self.net = None, []
        if cache and self.path.is_file():  # a finished run may be opened without it
            identity = {"encoder": fingerprint(self.path), "precision": precision, **(vars(low) if low else {})}
            self.store = Store(Path(cache).expanduser(), self.name, identity, writer)

    def loaded(self, device) -> nn.Module:
        if not self.net:
            config, tensors = read(str(self.path), lambda tensors, metadata: checkpoint.read_effnet(tensors))
            net = effnet.EffnetEncoder(config)
            state_dict.load_into(net, tensors, f"the semantic encoder of {self.path.name}")
            self.net.append(net.to(device, self.dtype).eval().requires_grad_(False))
        return self.net[0]

    @torch.no_grad()
    def encode(self, pictures: Tensor, device) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> (B, C, H/32, W/32) float32, and of the small ones."""
        net, parts = self.loaded(device), {}
        for one in pictures.split(1):  # of 4096 pixels one takes gigabytes
            image = one.to(device, self.dtype) / 255
            parts.setdefault("high", []).append(net(image).float())
            if self.low:
                parts.setdefault("low", []).append(net(self.low.shrink(image)).float())
        return {name: torch.cat(some) for name, some in parts.items()}


class FrozenVision:
    """Image embeddings of CLIP-L: part "embed"."""

    name, of = "clip_image", ""

    def __init__(self, folder: str, cache: str = "", writer: int = 0):
        self.folder, self.net, self.store = Path(folder).expanduser(), [], None
        if cache and self.folder.is_dir():
            self.store = Store(Path(cache).expanduser(), self.name, {"encoder": fingerprint(self.folder)}, writer)

    def loaded(self, device) -> nn.Module:
        if not self.net:
            libraries.hide_broken_torchvision()
            from transformers import CLIPVisionModelWithProjection

            try:
                net = CLIPVisionModelWithProjection.from_pretrained(self.folder, **libraries.LOCAL)
            except (OSError, ValueError) as error:
                raise ValueError(f"model.image_encoder={str(self.folder)!r} cannot be read as CLIP's image tower: "
                                 f"{state_dict.first_line(error)}.") from error
            self.net.append(net.to(device).eval().requires_grad_(False))
        return self.net[0]

    @torch.no_grad()
    def encode(self, pictures: Tensor, device) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> (B, D) float32. The short side is brought to the encoder's size, the middle taken."""
        net = self.loaded(device)
        side = net.config.image_size
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        found = []
        for one in pictures.split(1):
            image = one.to(device).float() / 255
            H, W = image.shape[-2:]
            size = [max(side, round(n * side / min(H, W))) for n in (H, W)]
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (size[0] - side) // 2, (size[1] - side) // 2
            image = image[..., top:top + side, left:left + side]
            found.append(net((image - mean) / std).image_embeds.float())
        return {"embed": torch.cat(found)}


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_encoders(config: Config, low: Low | None, writer: int = 0) -> list:
    folder = config.cache.folder
    found = [FrozenEffnet(config.vae.path, config.vae.precision, low, folder, writer)]
    if config.model.image_encoder:
        found.append(FrozenVision(config.model.image_encoder, folder, writer))
    return found
