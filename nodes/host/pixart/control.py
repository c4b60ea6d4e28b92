"""PixArt's ControlNets as ComfyUI CONTROL_NETs. Their residuals depend on what the base network has computed by then,
so the network calls them; what is made here says which, with which hint and how strongly."""
from __future__ import annotations

from dataclasses import dataclass

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ....models_impl.pixart.config import VAE_FACTOR
from ....models_impl.pixart.model import HintedControlNet
from ..common.control import AREA, NetworkControl
from ..common.patcher import is_dynamic
from ..common.prefetch import host_prefetch
from .model import CONTROL, PixArtModel

UPSCALE = "bilinear"


@dataclass(frozen=True)
class Hint:
    """A hint of 'Apply PixArt ControlNet'."""

    whole: Tensor
    """(B, C, H, W), C with a mask one more than the picture's: what packs that draw in tiles cut."""
    picture: Tensor
    mask: Tensor | None
    """(B, 1, h, w) in [0, 1], in its own size."""
    is_latent: bool

    def split(self, hint: Tensor) -> tuple[Tensor, Tensor | None]:
        """Picture and mask of `whole`, or of what a pack has cut from it."""
        if hint is self.whole or self.mask is None:
            return (self.picture if hint is self.whole else hint), self.mask
        return hint[:, :-1], hint[:, -1:]


class PixArtControl(NetworkControl):
    """One ControlNet with its hint: a picture to encode (`set_cond_hint` with a VAE), or a latent."""

    def __init__(self, net_patcher):
        super().__init__(net_patcher)
        self.latent_format = comfy.latent_formats.SD15()  # core's Apply nodes ask for a VAE only if there is one
        self.compression_ratio = 1  # beyond the VAE's, for packs that cut the hint into tiles
        self.own: Hint | None = None  # None: a picture by one of core's nodes
        self._seen: dict = {}  # (which hint, its area, size) -> the hint, latent and weights made of it
        self._base_dtype = torch.float32  # that the base network computes in, known when a run begins
        self._patch_size = net_patcher.model.config.patch_size

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        if not isinstance(model, PixArtModel):
            raise ValueError(f"A PixArt ControlNet cannot guide a {type(model).__name__}: load the PixArt model with "
                             "'Load PixArt Model'.")
        ours, theirs = self.net_patcher.model.config, model.config
        for name in ("hidden", "heads", "patch_size"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(f"This ControlNet was trained for a PixArt with {name}={getattr(ours, name)}, the "
                                 f"model has {getattr(theirs, name)}.")
        if len(self.net_patcher.model) >= theirs.depth:
            raise ValueError(f"This ControlNet has {len(self.net_patcher.model)} blocks, the model only "
                             f"{theirs.depth}: one more than the ControlNet's is needed.")
        self.latent_format = model.latent_format
        self._base_dtype = model.manual_cast_dtype or model.get_dtype()

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        start, end = self.timestep_range or (float("inf"), 0.0)
        if self.strength == 0 or not end <= float(t[0]) <= start:
            return before
        latent, weights = self._hint(x_noisy, cond.get(AREA))
        hint = comfy.controlnet.broadcast_image_to(latent, len(x_noisy), batched_number)
        strength = self.strength
        if weights is not None:
            strength = strength * comfy.controlnet.broadcast_image_to(weights, len(x_noisy), batched_number)
        net = self.net_patcher.model
        prefetch = host_prefetch(net, x_noisy.device, is_dynamic(self.net_patcher))
        control = HintedControlNet(net, hint, strength, prefetch)
        return {CONTROL: [*(before or {}).get(CONTROL, []), control]}

    def cleanup(self):
        super().cleanup()
        self._seen = {}

    def _hint(self, x: Tensor, area: tuple | None) -> tuple[Tensor, Tensor | None]:
        """(latent (B, 4, h, w) at the scale that the network sees latents in, weight per token (B, N, 1) or None) for
        x (B, 4, h, w), which may be the area of a prompt."""
        size, tile = tuple(x.shape[-2:]), self.cond_hint
        if tile is not None and tuple(tile.shape[-2:]) == size:  # a pack that cuts tiles has encoded it
            if self.own and self.own.mask is not None:
                raise ValueError("A node that draws in tiles encodes the hint of this PixArt ControlNet by itself, "
                                 "which loses its mask: take the mask away, or the tiles.")
            return tile.to(x.device, self._base_dtype), None
        original = self.cond_hint_original
        key = id(original), area, size
        if key not in self._seen:
            picture, mask = self.own.split(original) if self.own else (original, None)
            # x is float32 whatever the network computes in: ComfyUI casts it on the way in, but nothing of this.
            latent = self._encode(picture, size, area).to(x.device, self._base_dtype)
            weights = None if mask is None else self._weights(mask, size, area).to(latent)
            self._seen[key] = original, latent, weights  # with the hint, so that its id stays its own
        return self._seen[key][1:]

    def _encode(self, picture: Tensor, size: tuple[int, int], area: tuple | None) -> Tensor:
        if self.own and self.own.is_latent:
            return self._scaled(_part(picture, size, area, 1), "The hint")
        if self.vae is None:
            raise ValueError("A PixArt ControlNet reads its hint as a latent: connect the VAE of the PixArt model to "
                             "the node that applies it.")
        part = _part(picture, size, area, self.vae.spacial_compression_encode())
        loaded = mm.loaded_models(only_currently_used=True)
        latent = self.vae.encode(colours(part.movedim(1, -1)))
        mm.load_models_gpu(loaded)
        return self._scaled(latent, "What this VAE makes of the hint")

    def _scaled(self, latent: Tensor, what: str) -> Tensor:
        channels = self.latent_format.latent_channels
        if latent.shape[1] != channels:
            raise ValueError(f"{what} is a latent of {latent.shape[1]} channels, this PixArt reads {channels}: take "
                             "the VAE of the PixArt model.")
        return self.latent_format.process_in(latent)

    def _weights(self, mask: Tensor, size: tuple[int, int], area: tuple | None) -> Tensor:
        """The mask (B, 1, H, W) as a weight per token (B, N, 1)."""
        if area is not None:
            mask = _part(mask, size, area, VAE_FACTOR)
        tokens = F.interpolate(mask, [side // self._patch_size for side in size], mode="area")
        return tokens.flatten(2).transpose(1, 2)

    def copy(self):
        clone = PixArtControl(self.net_patcher)
        self.copy_to(clone)
        clone.own = self.own
        return clone

    def set_cond_hint(self, *args, **kwargs):
        """The hint as core's Apply nodes give it: a picture, without a mask."""
        self.own = None
        return super().set_cond_hint(*args, **kwargs)


def _part(picture: Tensor, size: tuple[int, int], area: tuple | None, ratio: int) -> Tensor:
    """A picture (B, C, H, W) as a latent of `size` cells sees it, `ratio` pixels a cell; of an area its part."""
    (_, _, y, x), whole = area or ((*size, 0, 0), size)
    height, width = (ratio * side for side in whole)
    picture = comfy.utils.common_upscale(picture, width, height, UPSCALE, "center")
    return picture[..., ratio * y : ratio * (y + size[0]), ratio * x : ratio * (x + size[1])]


def colours(picture: Tensor) -> Tensor:
    """(B, H, W, C) as the VAE reads it: without an alpha channel, and gray (C = 1) in three."""
    return picture.expand(-1, -1, -1, 3) if picture.shape[-1] == 1 else picture[..., :3]


def with_hint(
    control: PixArtControl, strength: float, start: float, end: float, image: Tensor | None = None,
    latent: Tensor | None = None, mask: Tensor | None = None, vae=None,
) -> PixArtControl:
    """A copy of `control` with its hint: image (B, H, W, 3) in [0, 1] with the VAE, or latent (B, 4, h, w)."""
    if (image is None) == (latent is None):
        raise ValueError("Give the ControlNet one hint: an image, or a latent.")
    if image is not None and vae is None:
        raise ValueError("To use an image as the hint, connect the VAE of the PixArt model too.")
    hinted = control.copy()
    picture = colours(image).movedim(-1, 1) if latent is None else latent
    whole = picture
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
        shown = F.interpolate(mask, picture.shape[-2:], mode="area").to(picture)
        rows = max(len(picture), len(mask))
        whole = torch.cat([comfy.utils.repeat_to_batch_size(part, rows) for part in (picture, shown)], dim=1)
    hinted.set_cond_hint(whole, strength, (start, end), *([vae] if latent is None else []))
    hinted.own = Hint(whole, picture, mask, latent is not None)
    return hinted
