"""Frozen VAEs: latents of pictures, whose statistics a `store.Store` keeps, and the way back."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...models_impl import state_dict
from ...models_impl.annotators import hed
from ...models_impl.guard import reading
from ...models_impl.known_files import whose
from ...models_impl.parsing import from_json
from ..libraries import hide_broken_torchvision
from ..training.noise import batch_noise
from . import taesd
from .precision import DTYPES
from .store import Store, fingerprint

PICTURES_AT_ONCE = 4
VAE_KINDS = ("AutoencoderKL", "AutoencoderTiny")
LAST_OF_ENCODER = "encoder.conv_out.weight"  # mean and deviation, so twice the latent's channels
POSTERIOR = 1  # the kind of `noise.picture_noise` that samples a latent


class FrozenVae(nn.Module):
    """Latents of a VAE that does not learn: diffusers' AutoencoderKL or AutoencoderTiny, a folder or one file, or what
    the recipe autoencoder exports.

    Latents are what the VAE says, no scale applied. of: whose pictures it encodes, "" or the name of a condition;
    annotator: a file of HED, whose soft edges of the picture are encoded in its place.
    """

    def __init__(self, path: str, precision: str = "fp32", cache: str = "", name: str = "latent", of: str = "",
                 writer: int = 0, annotator: str = ""):
        super().__init__()
        self.name, self.of, self.path, self.dtype = name, of, Path(path).expanduser(), DTYPES[precision]
        self.annotator, self.edges = Path(annotator).expanduser() if annotator else None, []
        if (self.path / "vae" / "config.json").is_file():  # a whole pipeline
            self.path = self.path / "vae"
        self.store = None
        if cache and self.path.exists():  # a finished run may be opened without it
            identity = {"encoder": fingerprint(self.path), "precision": precision, "of": of,
                        "annotator": fingerprint(self.annotator) if self.annotator else ""}
            self.store = Store(Path(cache).expanduser(), name, identity, writer)
        self.vae: list[nn.Module] = []

    def loaded(self, device) -> nn.Module:
        if not self.vae:
            self.vae.append(read_vae(self.path).to(device, self.dtype).eval().requires_grad_(False))
        return self.vae[0]

    def release(self):
        self.vae.clear()
        self.edges.clear()

    def annotated(self, pictures: Tensor, device) -> Tensor:
        """What is encoded in place of pictures, both (B, 3, H, W) uint8: eight bits, as a file of edges would have."""
        if self.annotator is None:
            return pictures
        if not self.edges:
            self.edges.append(hed.load(self.annotator, device=device))
        with torch.autocast(torch.device(device).type, enabled=False):
            edge = self.edges[0](pictures.to(device).float() / 255)[1]
        return (edge * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    @torch.no_grad()
    def encode(self, pictures: Tensor, device) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> mean and standard deviation of the latents, (B, C, h, w) float32 each."""
        vae, parts = self.loaded(device), {"mean": [], "std": []}
        with torch.autocast(torch.device(device).type, enabled=False):
            for some in pictures.split(PICTURES_AT_ONCE):
                some = self.annotated(some, device)
                found = vae.encode(some.to(device, self.dtype) / 127.5 - 1)
                latent = getattr(found, "latent_dist", None)
                mean = latent.mean if latent else found.latents
                parts["mean"].append(mean.float())
                parts["std"].append(latent.std.float() if latent else torch.zeros_like(mean, dtype=torch.float32))
        return {name: torch.cat(some) for name, some in parts.items()}

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1], float32."""
        vae = self.loaded(latent.device)
        with torch.autocast(latent.device.type, enabled=False):
            pictures = [vae.decode(some[None].to(self.dtype)).sample.float() for some in latent]
        return torch.cat(pictures).clamp(-1, 1)

    def latents(self, batch, device, seed: int) -> Tensor:
        """One sample of the latents of a batch, (B, C, h, w) float32: from its features if the cache gave it some."""
        found = {part: batch.features[name].to(device) for part in ("mean", "std")
                 if (name := f"{self.name}.{part}") in batch.features}
        if not found:
            found = self.encode(batch.conditions[self.of] if self.of else batch.pictures, device)
        mean, std = found["mean"], found["std"]
        return mean + std * batch_noise(seed, batch.step, batch.positions, mean.shape[1:], device, POSTERIOR)


def vae_problems(path: str, channels: int, reader: str) -> list[str]:
    """What is wrong with a vae.path that is there, for a network that reads latents of so many channels; the weights
    are not loaded. reader: the network, as a person knows it. A torch file is looked at when it is read."""
    place = Path(path).expanduser()
    if not path or not place.exists():
        return []  # said already
    if place.is_dir():
        folder = place / "vae" if (place / "vae" / "config.json").is_file() else place
        try:
            stated = vae_config(folder).get("latent_channels", 4)  # diffusers' own default
        except ValueError as error:
            return [str(error)]
    else:
        try:
            with safe_open(place, framework="pt") as file:
                names = {plain_vae_name(key): key for key in file.keys()}
                shapes = {name: file.get_slice(names[name]).get_shape() for name in (taesd.MARK, LAST_OF_ENCODER)
                          if name in names}
        except SafetensorError:
            return []
        if not shapes:
            return [not_a_vae(path, names)]
        stated = shapes[taesd.MARK][1] if taesd.MARK in shapes else shapes[LAST_OF_ENCODER][0] // 2
    return [] if stated == channels else [f"vae.path={path!r} makes latents of {stated} channels, and {reader} reads "
                                        f"{channels}: name the VAE that belongs to it."]


def vae_config(folder: Path) -> dict:
    """The config.json of a folder of diffusers. Raises ValueError where it is not a VAE's."""
    file = folder / "config.json"
    config = from_json(file.read_bytes(), str(file)) if file.is_file() else None
    if not isinstance(config, dict) or config.get("_class_name") not in VAE_KINDS:
        raise ValueError(f"vae.path={str(folder)!r} is not a VAE's folder: its config.json should name one of "
                         f"{', '.join(VAE_KINDS)}.")
    return config


def plain_vae_name(key: str) -> str:
    return key.removeprefix("first_stage_model.").removeprefix("vae.")


def not_a_vae(path: str, names) -> str:
    return f"vae.path={path!r} is not a VAE. {whose(names)}"


def read_vae(path: Path) -> nn.Module:
    """A VAE from a folder of diffusers, or from one file under the names of diffusers or of the original LDM, its sizes
    found from the shapes, or of TAESD as core knows it (`taesd`). Raises ValueError for anything else."""
    if not path.exists():
        raise ValueError(f"vae.path={str(path)!r}: there is no such file or folder.")
    hide_broken_torchvision()
    try:
        from diffusers import AutoencoderKL, AutoencoderTiny
    except ImportError as error:
        raise ValueError(f"vae.path needs diffusers: pip install diffusers ({error}).") from error
    if path.is_dir():
        kinds = dict(zip(VAE_KINDS, (AutoencoderKL, AutoencoderTiny), strict=True))
        return kinds[vae_config(path)["_class_name"]].from_pretrained(path, local_files_only=True)
    with reading(path):
        return _of_file(path, AutoencoderKL)


def _of_file(path: Path, AutoencoderKL: type) -> nn.Module:
    tensors = state_dict.read_file(path)[0]
    tensors = tensors.get("state_dict", tensors)
    tensors = {plain_vae_name(k): v for k, v in tensors.items()}
    first = "encoder.down_blocks.{}.resnets.0.conv1.weight", "encoder.down.{}.block.0.conv1.weight"
    if taesd.MARK in tensors:
        return taesd.from_core(tensors, f"the VAE of {path.name}")
    there = next((pattern for pattern in first if pattern.format(0) in tensors), None)
    if there is None or LAST_OF_ENCODER not in tensors:
        raise ValueError(not_a_vae(str(path), tensors))
    widths = []
    while (key := there.format(len(widths))) in tensors:
        widths.append(tensors[key].shape[0])
    layers = 0
    while there.format(0).replace(".0.conv1", f".{layers}.conv1") in tensors:
        layers += 1
    quant = "quant_conv.weight" in tensors
    vae = AutoencoderKL(
        block_out_channels=tuple(widths), layers_per_block=layers, norm_num_groups=32 if widths[0] % 32 == 0 else 4,
        latent_channels=tensors[LAST_OF_ENCODER].shape[0] // 2, use_quant_conv=quant,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    if there == first[1]:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = convert_ldm_vae_checkpoint(tensors, vae.config)
    own = vae.state_dict()
    tensors = {k: v.reshape(own[k].shape) if k in own and v.numel() == own[k].numel() else v
               for k, v in tensors.items() if not k.startswith(("loss.", "model_ema."))}
    state_dict.load_into(vae, tensors, f"the VAE of {path.name}")
    return vae
