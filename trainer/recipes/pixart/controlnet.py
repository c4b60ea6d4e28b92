"""PixArt-delta's ControlNet (arXiv 2401.05252, section 4): trainable copies of the first blocks beside a frozen PixArt.

The hint is a picture that the VAE encodes: soft edges that recipe.annotator finds in the picture itself, or a condition
that the data bring (data.conditions = ["hed"]). For alpha and for Sigma, of which no release has a ControlNet.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.guard import reading
from ....models_impl.pixart import checkpoint, controlnet, key_names
from ....models_impl.pixart.model import HintedControlNet
from ...config.schema import Config
from ...data.pictures import shown
from ...memory import quantization
from ...training.groups import Group, groups
from ..contract import Files
from .start import frozen, opened
from .task import PixArtRecipe, frozen_vae


class Recipe(PixArtRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text)
        base = opened(config, text)
        self.control = controlnet.PixArtControlNet(base.config, self.settings.blocks).initialise(base)
        if file := self.settings.control_from:
            with reading(file):
                _, _, tensors = checkpoint.read_controlnet(*state_dict.read_file(file), config=base.config.as_dict())
                state_dict.load_into(self.control, tensors, f"the ControlNet of recipe.blocks={self.settings.blocks}")
        self.net = quantization.frozen(frozen(base, config), config)
        self.prepare()
        self.hint = self.encoders[1]

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        of = "" if config.recipe.annotator else config.data.conditions[0]
        return [frozen_vae(config, writer=writer), frozen_vae(config, "hint", of, writer, config.recipe.annotator)]

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"control": 1.0})

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        copies = self.settings.blocks / self.net.config.depth
        return (1 + copies) * super().activation_bytes(pictures, cpu)

    def controlled(self, hint: Tensor):
        """The network with the ControlNet. hint: (B, C, h, w), for a batch of B or of a multiple."""
        def predict(x, timestep, **condition):
            there = hint.repeat(len(x) // len(hint), 1, 1, 1)
            return self.net(x, timestep, control=[HintedControlNet(self.control, there)], **condition)

        return predict

    def losses(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        d = self.denoising
        with d.autocast():
            step = d.noising(batch, timestep, dropped, seed)
            hint = d.latents(batch, seed, self.hint)
            return d.losses(self.controlled(hint), step, **self.loss_settings())

    @property
    def of_pictures(self) -> bool:
        return not self.hint.of

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "", conditions: dict[str, Tensor] | None = None) -> Tensor:
        """conditions: (B, 3, H, W) uint8, the hints by the name in data.conditions, or by the name "" pictures of which
        the annotator takes the edges; without them recipe.hints, of which it takes them too, if they are as many as
        the prompts; else no ControlNet."""
        d, hints = self.denoising, (conditions or {}).get(self.hint.of)
        if hints is None and len(self.settings.hints) == len(what):
            hints = torch.stack([shown(Path(file).expanduser(), height, width) for file in self.settings.hints])
        predict = self.net
        if hints is not None:
            predict = self.controlled(d.shape.latent_scale * self.hint.encode(hints, d.device)["mean"])
        return self.sample_with(predict, what, height, width, steps, cfg, seed, negative)

    def files(self) -> Files:
        tensors = key_names.to_released_controlnet(self.control.state_dict())
        return {"controlnet/{name}.safetensors": (tensors, checkpoint.metadata_controlnet(self.net.config))}
