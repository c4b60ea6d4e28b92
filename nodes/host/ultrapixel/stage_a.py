"""Stage A as a ComfyUI VAE that decodes exactly at every size, and knows what that takes."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ....models_impl.guard import reading
from ....models_impl.state_dict import read_file
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.stage_a import StageA, decode_bytes
from ..common import memory
from ..common.patcher import reloadable, with_weights
from ..common.pictures import colours
from ..common.shown import warn

TILES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)  # cells a side, four pixels each
COMFORT = 256
"""Tiles of this side cost a fifth more work than no tiles. Other models are only unloaded for smaller ones."""
HEADROOM = 1.2  # workspaces of the kernels, fragmentation


def load(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> StageAVAE:
    """A Stage A file as VAE; dtype None lets ComfyUI choose. Raises ValueError for another file."""
    file = Path(path)
    vae = StageAVAE(dtype)
    with reading(file):
        tensors, metadata = read_file(file)
        config, tensors = checkpoint.read_stage_a(tensors, metadata)
        # ComfyUI's latents of Stage B are already scaled: its latent format SC_B multiplies by 0.43 after the sampler.
        config = replace(config, scale_factor=1.0)
        net = StageA(config, operations=comfy.ops.disable_weight_init, dtype=vae.vae_dtype)
        patched = with_weights(net.eval(), tensors, f"a Stage A ({file.name})", load_device=vae.device,
                               offload_device=mm.vae_offload_device(), disable_dynamic=disable_dynamic)
    vae.take(reloadable(patched, load_patcher, path, dtype))
    return vae


def load_patcher(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """The ModelPatcher that `load` puts into the VAE."""
    return load(path, dtype, disable_dynamic).patcher


class StageAVAE(comfy.sd.VAE):
    def __init__(self, dtype: torch.dtype | None):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=dtype)
        self.process_input = self.process_output = lambda image: image  # [0, 1] on both sides
        self.memory_used_decode = lambda shape, dtype: self.bytes(*shape[-2:], dtype)
        self.memory_used_encode = lambda shape, dtype: self.bytes(
            *(math.ceil(side / self.downscale_ratio) for side in shape[-2:]), dtype
        )

    def take(self, patched):
        net = patched.model
        self.first_stage_model, self.patcher, self.size = net, patched, None
        self.latent_channels = net.config.latent_channels
        self.downscale_ratio = self.upscale_ratio = net.config.compression

    def bytes(self, height: int, width: int, dtype: torch.dtype) -> float:
        """Memory of the decode of a latent, or a tile and its halo, over the weights and the picture.

        Every tensor that it makes, times HEADROOM. On a CPU the kernels may take more: oneDNN's scratch memory differs
        between instruction sets.
        """
        return HEADROOM * decode_bytes(self.first_stage_model.config, height, width, mm.dtype_size(dtype))

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """An IMAGE -> (B, 4, h, w)."""
        pixels = colours(pixel_samples)
        if min(pixels.shape[1:3]) < self.downscale_ratio:
            raise ValueError(f"Stage A makes one cell of {self.downscale_ratio}x{self.downscale_ratio} pixels, and "
                             f"this picture is {pixels.shape[2]}x{pixels.shape[1]}.")
        return super().encode(pixels)

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        """(B, 4, h, w) -> (B, 4h, 4w, 3). Whole where the memory is there, else by the largest tiles that fit."""
        return self._decode(samples_in, None)

    def decode_tiled(self, samples: Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None
                     ) -> Tensor:
        """Decode by tiles of a given side. Each includes the cells that it depends on, so `overlap` changes nothing."""
        return self._decode(samples, min(tile_x or COMFORT, tile_y or COMFORT))

    @torch.no_grad()
    def _decode(self, samples: Tensor, tile: int | None) -> Tensor:
        self._check(samples)
        B, _, H, W = samples.shape
        side = min(tile or COMFORT, max(H, W))
        mm.load_models_gpu([self.patcher], memory_required=self._with_tiles(H, W, side))
        scale, bar = self.upscale_ratio, comfy.utils.ProgressBar(B)
        picture = torch.empty(B, H * scale, W * scale, 3, device=self.output_device)
        for i, latent in enumerate(samples.split(1)):

            def report(done: int, whole: int, before: int = i):
                mm.throw_exception_if_processing_interrupted()
                bar.update_absolute(before * whole + done, B * whole)

            latent = latent.to(device=self.device, dtype=self.vae_dtype)
            picture[i] = self._one(latent, tile or self.tile(H, W), report)[0].movedim(0, -1)
        return picture

    def _one(self, latent: Tensor, tile: int | None, report) -> Tensor:
        net = self.first_stage_model
        while True:
            try:
                return net.decode(latent, callback=report) if tile is None else net.decode_tiled(
                    latent, tile, callback=report)
            except Exception as error:
                if not memory.is_oom(error):
                    raise
                smaller = next((t for t in TILES if t < (tile or max(latent.shape[-2:]))), None)
                if smaller is None:
                    raise
            # outside of `except`, which keeps hold of the tensors
            warn(f"Stage A ran out of memory; decoding again by tiles of {smaller * self.upscale_ratio} pixels, with "
                 "the same result.")
            tile = smaller
            mm.soft_empty_cache()

    def tile(self, height: int, width: int) -> int | None:
        """Cells along a side of the largest tiles that fit the free memory; None: the whole picture does."""
        free = memory.free(self.patcher, self.device)
        if self.bytes(height, width, self.vae_dtype) <= free:
            return None
        fitting = (t for t in TILES if t < max(height, width) and self._with_tiles(height, width, t) <= free)
        return next(fitting, TILES[-1])

    def _with_tiles(self, height: int, width: int, tile: int) -> float:
        """Memory of a tile with its halo and of the picture that the tiles are put in."""
        halo, picture = self.first_stage_model.config.halo, 3 * self.upscale_ratio**2 * height * width
        return (self.bytes(*(min(side, tile + 2 * halo) for side in (height, width)), self.vae_dtype)
                + picture * mm.dtype_size(self.vae_dtype))

    def _check(self, samples: Tensor):
        if samples.ndim != 4 or samples.shape[1] != self.latent_channels:
            more = " Sixteen are Stage C's: sample with Stage B first." if samples.shape[1] == 16 else ""
            raise ValueError(f"Stage A decodes latents (batch, {self.latent_channels}, height, width); this one is "
                             f"{list(samples.shape)}.{more}")
