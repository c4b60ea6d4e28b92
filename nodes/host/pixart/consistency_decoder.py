"""DALL-E 3's consistency decoder (openai/consistency-decoder, MIT) as a ComfyUI VAE; the network is diffusers'."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import torch
from torch import Tensor, nn

from ....models_impl.guard import reading
from ....models_impl.known_files import WrongFile
from ....models_impl.state_dict import load_into, read_file, unwrapped
from ..common.patcher import patcher, reloadable

# 16 GB at 1024 x 1024 in float16 (huggingface/diffusers#5761), 1.3 GB of which are weights
BYTES_PER_PIXEL_AND_BYTE = 7000
CHANNELS = 4
SEED = 0  # the decoder adds noise; the same latent should give the same picture


class Codec(nn.Module):
    """Encode and decode as ComfyUI's VAE calls them: pixels in [-1, 1], latents before latent_scale."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)  # gray
        return self.vae.encode(pixels).latent_dist.mode()

    def decode(self, latent: Tensor) -> Tensor:
        if latent.shape[1] != CHANNELS:
            raise ValueError(f"The consistency decoder reads the {CHANNELS} channels of PixArt-alpha's latents, this "
                             f"one has {latent.shape[1]}: decode it with the VAE of its own model.")
        noise = torch.Generator("cpu").manual_seed(SEED)
        pictures = [self.vae.decode(row, generator=noise).sample for row in latent.split(1)]
        return torch.cat(pictures).clamp(-1, 1)


def load(path: str, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """Raises ValueError where diffusers is missing, or the file is another one."""
    try:
        from diffusers import ConsistencyDecoderVAE
    except ImportError as error:
        raise ValueError("The consistency decoder needs the package diffusers: install it in ComfyUI's Python."
                         ) from error
    file = Path(path)
    with reading(file):
        tensors = unwrapped(read_file(file)[0], ("state_dict",))
        if not any(key.startswith("decoder_unet.") for key in tensors):
            raise WrongFile(f"{file.name} is not the consistency decoder in diffusers' format.", tensors)
        net = ConsistencyDecoderVAE(**sizes(tensors))
        load_into(net, tensors, f"the consistency decoder ({file.name})")
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = Codec(net).eval().to(vae.vae_dtype)
    patched = patcher(vae.first_stage_model, load_device=vae.device, offload_device=mm.vae_offload_device(),
                      disable_dynamic=disable_dynamic)
    vae.patcher = reloadable(patched, load_patcher, path)
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = CHANNELS, 8, 8
    vae.memory_used_decode = lambda shape, dtype: (
        64 * shape[2] * shape[3] * BYTES_PER_PIXEL_AND_BYTE * mm.dtype_size(dtype)
    )
    vae.memory_used_encode = lambda shape, dtype: 1767 * shape[2] * shape[3] * mm.dtype_size(dtype)  # core's for SD's
    return vae


def load_patcher(path: str, disable_dynamic: bool = False):
    """The ModelPatcher that `load` puts into the VAE."""
    return load(path, disable_dynamic).patcher


def sizes(tensors: dict[str, Tensor]) -> dict:
    """Widths of the stages, of files that are not the release too."""
    def widths(start: str, end: str) -> list[int]:
        channels, index = [], 0
        while (key := f"{start}.{index}.{end}") in tensors:
            channels.append(tensors[key].shape[0])
            index += 1
        return channels

    return dict(
        encoder_block_out_channels=tuple(widths("encoder.down_blocks", "resnets.0.conv1.weight")),
        decoder_block_out_channels=tuple(widths("decoder_unet.down_blocks", "resnets.0.conv1.weight")),
    )
