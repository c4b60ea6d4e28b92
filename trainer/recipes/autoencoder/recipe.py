"""A small autoencoder (TAESD's network) from nothing: pictures through latents and back, no captions, no classes.

The latent is what the encoder says plus noise of a fixed width, so of what a VAE's bound (arXiv 1312.6114, eq. 10) asks
of latents one term is left that can change: half their square. The exported file scales latents so that the family
which draws them sees unit variance.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import previews, state_dict
from ....models_impl.annotators import hed
from ....models_impl.guard import reading, shape_of
from ...config.schema import Config
from ...data import pictures
from ...features import taesd
from ...features.taesd import FACTOR
from ...memory.activations import kept_bytes
from ...training.groups import Group
from ...training.noise import batch_noise
from ...training.validation import certainty
from ..contract import Base, Files

MEMORY = 0.01  # how much of the mean square of latents a pass renews


class Recipe(Base):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.model, self.config, self.text = config.recipe, config.model, config, None
        if config.init_from and not network:
            path = Path(config.init_from).expanduser()
            with reading(path):
                self.net = taesd.from_core(state_dict.read_file(path)[0], f"the autoencoder of {path.name}").net
        else:
            self.net = taesd.Taesd(self.model.latent_channels).net
            taesd.initialise(self.net)
        self.net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        self.register_buffer("square", torch.ones(()))
        self.hed: list[hed.HED] = []  # in a list: not a part of what is trained or saved
        self.bf16 = config.precision == "bf16"

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        if not config.init_from:
            return []
        try:
            with reading(config.init_from):
                tensors = state_dict.read_file(Path(config.init_from).expanduser())[0]
                channels = shape_of(tensors, taesd.MARK, 4)[1]
        except (ValueError, OSError) as error:
            return [f"init_from={config.init_from} is not an autoencoder of this recipe ({error})."]
        return [] if channels == config.model.latent_channels else [
            f"init_from={config.init_from} has {channels} latent channels, model.latent_channels="
            f"{config.model.latent_channels}."]

    def groups(self, config: Config) -> list[Group]:
        """matrices: the kernels between the first and the last layer of each half."""
        named = list(self.net.named_parameters("net"))
        halves = {"encoder": self.net.encoder, "decoder": self.net.decoder}
        outer = {f"net.{name}.layers.{i}.weight" for name, half in halves.items() for i in (0, len(half.layers) - 1)}
        return [Group(named, matrices=frozenset(n for n, p in named if p.ndim == 4) - outer)]

    def forward(self, batch) -> Tensor:
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

    def blocks(self) -> list[nn.Module]:
        return [self.net.encoder, self.net.decoder]

    def described(self, step: int) -> list[str]:
        return ["as it is"] * self.config.batch_size

    def buckets(self, step: int) -> list[str]:
        side = self.config.data.resolution
        return [f"{self.config.batch_size} pictures of {side}x{side} pixels, {(side // FACTOR) ** 2} latent cells of "
                f"{self.model.latent_channels} numbers each"]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        """Extrapolated from a small picture: all layers are convolutions, and the network is of one size."""
        net, side = taesd.Taesd(self.model.latent_channels).net, 4 * FACTOR
        x = torch.zeros(1, 3, side, side)
        kept = kept_bytes(net, lambda: net.decode(net.encode(x).latents), self.bf16)
        return pictures * kept * (self.config.data.resolution / side) ** 2

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
        return {"loss": torch.cat(errors).mean().item(), **certainty(torch.cat(errors)),
                "psnr": (10 * torch.log10(4 / torch.cat(squares).clamp_min(1e-12))).mean().item()}

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """Picture files, each with what becomes of it at its right: (B, 3, H, 2*W) in [-1, 1]. Nothing else is read."""
        shown = torch.stack([pictures.shown(Path(file).expanduser(), height, width) for file in what])
        again = self.again(shown)
        return torch.cat([shown.to(again) / 127.5 - 1, again], dim=3)

    def network(self) -> dict:
        return {"latent_channels": self.model.latent_channels}

    def files(self) -> Files:
        """What export writes: core's Load VAE takes it."""
        scale = self.model.latent_scale * self.square.sqrt().item()
        tensors = taesd.to_core(self.net, scale, self.model.latent_shift)
        written = taesd.from_core(tensors, "this autoencoder")
        colours = previews.metadata(lambda shown: written.encode(shown).latents, FACTOR)
        return {"vae/{name}.safetensors": (tensors, taesd.metadata(self.model.latent_channels) | colours)}
