"""PixArt's ControlNets as ComfyUI CONTROL_NETs. Their residuals depend on what the base network has computed by then,
so the network calls them; what is made here says which, with which hint and how strongly."""
from __future__ import annotations

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ....models_impl.pixart.controlnet import Control
from ..common.control import NetworkControl
from ..common.patcher import is_dynamic
from ..common.prefetch import host_prefetch
from .model import CONTROL, PixArtModel

UPSCALE = "bilinear"


class PixArtControl(NetworkControl):
    """One ControlNet with its hint: a picture to encode (`set_cond_hint` with a VAE), or a latent."""

    def __init__(self, net_patcher):
        super().__init__(net_patcher)
        self.latent_format = comfy.latent_formats.SD15()  # core's Apply nodes ask for a VAE only if there is one
        self.hint_latent: Tensor | None = None
        self.mask: Tensor | None = None
        self._weights: Tensor | None = None  # the mask's, per token
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
        height, width = x_noisy.shape[-2:]
        if self.cond_hint is None or self.cond_hint.shape[-2:] != (height, width):
            # x_noisy is float32 whatever the network computes in: ComfyUI casts it on the way in, but nothing of this.
            self.cond_hint = self._encode(height, width).to(x_noisy.device, self._base_dtype)
            self._weights = None if self.mask is None else self._tokens(height, width).to(self.cond_hint)
        hint = comfy.controlnet.broadcast_image_to(self.cond_hint, len(x_noisy), batched_number)
        strength = self.strength
        if self._weights is not None:
            strength = strength * comfy.controlnet.broadcast_image_to(self._weights, len(x_noisy), batched_number)
        net = self.net_patcher.model
        control = Control(net, hint, strength, host_prefetch(net, x_noisy.device, is_dynamic(self.net_patcher)))
        return {CONTROL: [*(before or {}).get(CONTROL, []), control]}

    def cleanup(self):
        super().cleanup()
        self._weights = None

    def _encode(self, height: int, width: int) -> Tensor:
        """The hint (B, 4, height, width) at the scale that the network sees latents in."""
        if self.hint_latent is not None:
            latent = comfy.utils.common_upscale(self.hint_latent, width, height, UPSCALE, "center")
            return self._seen(latent, "The hint")
        if self.vae is None:
            raise ValueError("A PixArt ControlNet reads its hint as a latent: connect the VAE of the PixArt model to "
                             "the node that applies it.")
        ratio = self.vae.spacial_compression_encode()
        picture = comfy.utils.common_upscale(self.cond_hint_original, width * ratio, height * ratio, UPSCALE, "center")
        loaded = mm.loaded_models(only_currently_used=True)
        latent = self.vae.encode(colours(picture.movedim(1, -1)))
        mm.load_models_gpu(loaded)
        return self._seen(latent, "What this VAE makes of the hint")

    def _seen(self, latent: Tensor, what: str) -> Tensor:
        channels = self.latent_format.latent_channels
        if latent.shape[1] != channels:
            raise ValueError(f"{what} is a latent of {latent.shape[1]} channels, this PixArt reads {channels}: take "
                             "the VAE of the PixArt model.")
        return self.latent_format.process_in(latent)

    def _tokens(self, height: int, width: int) -> Tensor:
        """The mask (B, H, W) as a weight per token (B, N, 1)."""
        mask = self.mask.reshape(-1, 1, *self.mask.shape[-2:]).float()
        tokens = F.interpolate(mask, (height // self._patch_size, width // self._patch_size), mode="area")
        return tokens.flatten(2).transpose(1, 2)

    def copy(self):
        clone = PixArtControl(self.net_patcher)
        self.copy_to(clone)
        clone.hint_latent, clone.mask = self.hint_latent, self.mask
        return clone


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
    if image is not None:
        hinted.set_cond_hint(image.movedim(-1, 1), strength, (start, end), vae)
    else:
        hinted.set_cond_hint(torch.zeros(1), strength, (start, end))
        hinted.hint_latent = latent
    hinted.mask = mask
    return hinted
