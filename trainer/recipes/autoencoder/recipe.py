"""A small autoencoder (TAESD's network) from nothing."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import previews, state_dict
from ....models_impl.guard import reading, shape_of
from ...config.schema import Config
from ...features import taesd
from ...features.taesd import FACTOR
from ...memory.activations import kept_bytes
from ...training.groups import Group
from ..contract import Files
from ..reconstruction import Reconstruction


class Recipe(Reconstruction):
    factor = FACTOR

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config)
        self.channels = self.model.latent_channels
        if config.init_from and not network:
            path = Path(config.init_from).expanduser()
            with reading(path):
                self.net = taesd.from_core(state_dict.read_file(path)[0], f"the autoencoder of {path.name}").net
        else:
            self.net = taesd.Taesd(self.model.latent_channels).net
            taesd.initialise(self.net)
        self.net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU

    def encode(self, shown: Tensor) -> Tensor:
        return self.net.encode(shown.contiguous(memory_format=torch.channels_last)).latents

    def decode(self, latent: Tensor) -> Tensor:
        return self.net.decode(latent).sample

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

    def blocks(self) -> list[nn.Module]:
        return [self.net.encoder, self.net.decoder]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        """Extrapolated from a small picture: all layers are convolutions, and the network is of one size."""
        net, side = taesd.Taesd(self.model.latent_channels).net, 4 * FACTOR
        x = torch.zeros(1, 3, side, side)
        kept = kept_bytes(net, lambda: net.decode(net.encode(x).latents), self.bf16)
        return pictures * kept * (self.config.data.resolution / side) ** 2

    def network(self) -> dict:
        return {"latent_channels": self.model.latent_channels}

    def files(self) -> Files:
        """What export writes: core's Load VAE takes it."""
        scale = self.model.latent_scale * self.square.sqrt().item()
        tensors = taesd.to_core(self.net, scale, self.model.latent_shift)
        written = taesd.from_core(tensors, "this autoencoder")
        colours = previews.metadata(lambda shown: written.encode(shown).latents, FACTOR)
        return {"vae/{name}.safetensors": (tensors, taesd.metadata(self.model.latent_channels) | colours)}
