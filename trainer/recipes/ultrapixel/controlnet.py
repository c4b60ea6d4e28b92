"""A ControlNet for Stage C: edges, or any other condition picture, to residuals of some ResBlocks. UltraPixel uses it
in its low-resolution pass. (modules/controlnet.py and train/ of Stability-AI/StableCascade@7a7d341f, MIT)

The norms of its backbone keep the means they begin with: at one to four pictures a pass those of a batch would be
noise, and other ones in every process.
"""
from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.annotators.canny import RESIZE, canny
from ....models_impl.ultrapixel import checkpoint, sampling
from ....models_impl.ultrapixel.config import ControlNetConfig, StageCConfig
from ....models_impl.ultrapixel.controlnet import ControlNet
from ...config.schema import Config
from ...data import pictures
from ...features.store import Store
from ...libraries import probing
from ...memory.activations import casts, kept_bytes
from ...training.groups import Group, groups
from ...training.noise import VALIDATION
from ..contract import Files
from . import settings
from .encoders import make_encoders
from .networks import base, guide_of, read
from .settings import CANNY, PIXELS
from .task import StageCRecipe, file_problems, in_transformer


class HintPictures:
    """The hint of every picture, as `cache` takes it: part "image", (B, channels, H, W) uint8."""

    name = "hint"

    def __init__(self, settings: settings.UltraPixelControlNetSettings, cache: str = "", writer: int = 0):
        self.hint, self.channels = settings.hint, settings.channels
        self.of = "" if self.hint == CANNY else self.hint
        identity = {"hint": self.hint, "channels": self.channels, **({"resize": RESIZE} if not self.of else {})}
        self.store = Store(Path(cache).expanduser(), self.name, identity, writer) if cache else None

    def encode(self, images: Tensor, device) -> dict[str, Tensor]:
        """images: (B, 3, H, W) uint8, pictures for canny and else condition pictures."""
        if self.hint == CANNY:
            found = canny(images.float() / 255).expand(-1, self.channels, -1, -1)
        else:
            found = images.float() / 255
            found = found.mean(1, keepdim=True) if self.channels == 1 else found
        return {"image": (255 * found).round().to(torch.uint8)}


def shape_of(config: Config, stage_c: StageCConfig) -> ControlNetConfig:
    """Shape of the ControlNet in init_from, else of [recipe]. Raises ValueError where it does not fit Stage C."""
    s = config.recipe
    if config.init_from:
        found = read(config.init_from, checkpoint.read_controlnet)[0]
        if found.in_channels != s.channels:
            raise ValueError(f"init_from={config.init_from} reads hints of {found.in_channels} channels, "
                             f"recipe.channels={s.channels}.")
    else:
        found = ControlNetConfig(in_channels=s.channels, hidden=stage_c.hidden[0], blocks=tuple(s.blocks),
                                 backbone=s.backbone)
    there = sum(kinds.count("C") for kinds in (*stage_c.down, *stage_c.up))
    if max(found.blocks) >= there or found.hidden != stage_c.hidden[0]:
        raise ValueError(f"A ControlNet for ResBlock {max(found.blocks)}, {found.hidden} wide, does not fit a Stage C "
                         f"of {there} ResBlocks, {stage_c.hidden[0]} wide.")
    return found


class Recipe(StageCRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text, base(config, reopened=bool(network)))
        self.guide = guide_of(config)
        shape = ControlNetConfig.from_dict(network) if network else shape_of(config, self.net.config)
        self.controlnet = ControlNet(shape).eval()
        if not network:
            self.begin(config)
        self.prepare()
        self.hints = self.encoders[-1]
        self.bf16 = config.precision == "bf16"

    @torch.no_grad()
    def begin(self, config: Config):
        """From init_from; else as Stable Cascade begins: a backbone that has seen pictures, and residuals of zero."""
        net = self.controlnet
        if config.init_from:
            tensors = read(config.init_from, checkpoint.read_controlnet)[1]
            return state_dict.load_into(net, tensors, f"the ControlNet ({config.init_from})")
        if net.config.backbone == "effnet":
            known = read(config.vae.path, lambda tensors, _: checkpoint.read_effnet(tensors))[1]
            known = {k.removeprefix("backbone."): v.float() if v.is_floating_point() else v for k, v in known.items()
                     if k.startswith("backbone.")}
            known["0.0.weight"] = known["0.0.weight"][:, :net.config.in_channels]
            state_dict.load_into(net.backbone, known, f"the backbone ({config.vae.path})")
        for projection in net.projections:
            nn.init.zeros_(projection[-1].weight)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [*make_encoders(config, None, writer), HintPictures(config.recipe, config.cache.folder, writer)]

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        problems = file_problems(config)
        if not any(p.startswith("[model]") for p in problems):
            try:
                shape_of(config, read(config.model.stage_c)[0])
            except ValueError as error:
                problems.append(str(error))
        return problems

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"controlnet": 1.0}, in_transformer)

    def residuals(self, hint: Tensor) -> list[Tensor | None]:
        """hint: (B, channels, H, W) uint8."""
        hint = hint.to(self.denoising.device).float() / 255
        with torch.autocast(hint.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.controlnet(hint)

    def losses(self, batch, draws, seed: int) -> Tensor:
        d = self.denoising
        latents, hint = d.latents(batch, seed), d.features(batch, "hint.image")
        return d.plain(latents.high, draws.t, d.conditioning(batch, draws), control=self.residuals(hint))

    def forward(self, batch) -> Tensor:
        return self.weighted(batch, lambda draws: self.losses(batch, draws, self.denoising.seed))

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        few, many = (kept(self.controlnet.config, side, self.bf16) for side in (64, 128))
        own = few + (many - few) * (self.config.data.resolution**2 - 64**2) / (128**2 - 64**2)
        return pictures * own + super().activation_bytes(pictures, cpu) + casts(self.controlnet, self.bf16)

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(
            batches, lambda batch, draws: {"loss": self.losses(batch, draws, VALIDATION)})

    @property
    def of_pictures(self) -> bool:
        return not self.hints.of

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "", conditions: dict[str, Tensor] | None = None) -> Tensor:
        """In two passes where there is a guide; the hints act on the first. The release draws with shift 2 and cfg 1.
        conditions: (B, 3, H, W) uint8 by name, pictures whose edges are taken by "canny" or ""; without them,
        recipe.sample_hints."""
        d = self.denoising
        sizes = sampling.sizes(height, width)
        cells = sizes.stage_c if self.guide is None else sizes.low
        size = tuple(PIXELS * n for n in cells)  # a cell of the hint is one of the latent, as in training
        given = next((conditions[name] for name in (self.settings.hint, "") if name in (conditions or {})), None)
        if given is None:
            files = self.settings.sample_hints
            if not files:
                raise ValueError("recipe.sample_hints names no pictures to take hints from.")
            given = torch.stack([pictures.shown(Path(files[i % len(files)]).expanduser(), *size)
                                 for i in range(len(what))])
        elif tuple(given.shape[-2:]) != size:
            given = torch.nn.functional.interpolate(given.float(), size, mode="bilinear", antialias=True)
            given = given.round().clamp(0, 255).to(torch.uint8)
        control = self.residuals(self.hints.encode(given, d.device)["image"])
        return d.sample(what, height, width, steps, shift, cfg, seed, self.guide, control=control,
                        negative=negative)

    def network(self) -> dict:
        return self.controlnet.config.as_dict()

    def files(self) -> Files:
        net = self.controlnet
        return {"controlnet/{name}.safetensors": (net.state_dict(), checkpoint.metadata(net.config))}


@cache
def kept(shape: ControlNetConfig, side: int, bf16: bool) -> int:
    """What one forward pass keeps of one hint; side: in pixels."""
    with probing():
        net = ControlNet(shape).eval()
        return kept_bytes(net, lambda: net(torch.zeros(1, shape.in_channels, side, side)), bf16)
