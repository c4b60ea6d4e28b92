"""A ControlNet for Stage C: edges, or any other condition picture, to residuals of some ResBlocks. UltraPixel uses it
in its low-resolution pass. (modules/controlnet.py and train/ of Stability-AI/StableCascade@7a7d341f, MIT)

The norms of its backbone keep the means they begin with: at one to four pictures a pass those of a batch would be
noise, and other ones in every process.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.annotators.canny import RESIZE, canny
from ....models_impl.ultrapixel import checkpoint, sampling
from ....models_impl.ultrapixel.config import ControlNetConfig, StageCConfig
from ....models_impl.ultrapixel.controlnet import ControlNet
from ...config import Config, nearest
from ...data import pictures
from ...features.store import Store
from ...training import plan
from ...training.noise import VALIDATION
from . import encoders, loss_weight, networks, task
from . import settings as settings_

CANNY = "canny"


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "ultrapixel_controlnet"
    hint: str = CANNY
    """canny: edges of the pictures themselves, sought at 224 x 224 as the released ControlNet knows them. Else one of
    data.conditions."""
    channels: int = 1
    """Of the hint: 1 takes the mean of a condition picture's colours, 3 the colours."""
    backbone: str = "effnet"
    """Of a ControlNet that starts from nothing. effnet: EfficientNetV2-S, its weights taken from the encoder of
    vae.path; large or simple: new weights."""
    blocks: list[int] = field(default_factory=lambda: list(checkpoint.RELEASED_BLOCKS))
    """The ResBlocks that get a residual. ComfyUI's loader knows these alone."""
    dropout: float = 0.05
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is told beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Of the loss, by its noise level: adaptive, p2 or none, as for ultrapixel_guide."""
    sample_hints: list[str] = field(default_factory=list)
    """Pictures whose hints the sample prompts get, in turn; for another hint than canny, the condition pictures."""


class Hints:
    """The hint of every picture, as `cache` takes it: part "image", (B, channels, H, W) uint8."""

    name = "hint"

    def __init__(self, settings: Settings, cache: str = "", writer: int = 0):
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
    """Of the ControlNet in init_from, else of [recipe]. Raises ValueError where it does not fit Stage C."""
    s = config.recipe
    if config.init_from:
        found = networks.read(config.init_from, checkpoint.read_controlnet)[0]
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


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings_.Model, ("vae", "memory.base")

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again; without it, [model] and init_from say it."""
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        self.net = networks.base(config, reopened=bool(network))
        self.guide = networks.guide_of(config)
        shape = ControlNetConfig.from_dict(network) if network else shape_of(config, self.net.config)
        self.controlnet = ControlNet(shape).eval()
        if not network:
            self.begin(config)
        self.weight = loss_weight.LossWeight(config.recipe.weight, config.batch_size)
        self.encoders = self.make_encoders(config)
        self.hints = self.encoders[-1]
        self.denoising = task.Denoising(config, self.net, text, self.encoders)
        self.bf16 = config.precision == "bf16"

    @torch.no_grad()
    def begin(self, config: Config):
        """From init_from; else as Stable Cascade begins: a backbone that has seen pictures, and residuals of zero."""
        net = self.controlnet
        if config.init_from:
            tensors = networks.read(config.init_from, checkpoint.read_controlnet)[1]
            return state_dict.load_into(net, tensors, f"the ControlNet ({config.init_from})")
        if net.config.backbone == "effnet":
            known = networks.read(config.vae.path, lambda tensors, _: checkpoint.read_effnet(tensors))[1]
            known = {k.removeprefix("backbone."): v.float() if v.is_floating_point() else v for k, v in known.items()
                     if k.startswith("backbone.")}
            known["0.0.weight"] = known["0.0.weight"][:, :net.config.in_channels]
            state_dict.load_into(net.backbone, known, f"the backbone ({config.vae.path})")
        for projection in net.projections:
            nn.init.zeros_(projection[-1].weight)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """What makes features of pictures, and keeps them (`cache`)."""
        return [*encoders.make_encoders(config, None, writer), Hints(config.recipe, config.cache.folder, writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        found, s = task.problems(config) + task.problems_of_loss(config.recipe), config.recipe
        known = (CANNY, *config.data.conditions)
        if s.hint not in known:
            found.append(f"recipe.hint={s.hint!r} is none of {', '.join(known)}{nearest(s.hint, known)}: name it in "
                         "data.conditions too.")
        if s.channels not in (1, 3):
            found.append(f"recipe.channels={s.channels} must be 1 or 3.")
        if config.samples.every and not s.sample_hints:
            found.append(f"samples.every={config.samples.every} draws pictures, and recipe.sample_hints names none to "
                         "take their hints from.")
        found += [f"recipe.sample_hints: there is no file {p!r}." for p in s.sample_hints
                  if not Path(p).expanduser().is_file()]
        files = [Path(p).expanduser() for p in (config.model.stage_c, config.init_from) if p]
        said = any(p.startswith("[model]") for p in found)
        if config.model.stage_c and all(f.is_file() for f in files) and not said:
            try:
                shape_of(config, networks.read(config.model.stage_c)[0])
            except ValueError as error:
                found.append(str(error))
        return found

    def groups(self, config: Config) -> list[dict]:
        """Parameters that learn, with their rates."""
        return task.groups({"controlnet": (self.controlnet, 1.0)})

    def residuals(self, hint: Tensor) -> list[Tensor | None]:
        """hint: (B, channels, H, W) uint8."""
        hint = hint.to(self.denoising.device).float() / 255
        with torch.autocast(hint.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.controlnet(hint)

    def losses(self, batch, chance: task.Chance, seed: int) -> Tensor:
        d = self.denoising
        latents, hint = d.latents(batch, seed), d.features(batch, "hint.image")
        return d.plain(latents.high, latents.noise, chance.t, d.told(batch, chance), control=self.residuals(hint))

    def forward(self, batch) -> Tensor:
        """Loss of each picture times the weight of its noise level, (B,)."""
        d = self.denoising
        chance = d.draw(batch.step).part(batch.positions)
        return self.weight(d.schedule.logsnr(chance.t), self.losses(batch, chance, d.seed), batch)

    def compile_blocks(self):
        task.compile_blocks(self.net)

    def described(self, step: int) -> list[str]:
        """What chance decides about each picture of a step's batch, in words."""
        return self.denoising.draw(step).described()

    def buckets(self, step: int) -> list[str]:
        return task.sizes(self.config, None)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        net, c = ControlNet(self.controlnet.config).eval(), self.controlnet.config.in_channels
        few, many = (plan.kept_bytes(net, lambda side=side: net(torch.zeros(1, c, side, side)), self.bf16)
                     for side in (64, 128))
        own = few + (many - few) * (self.config.data.resolution**2 - 64**2) / (128**2 - 64**2)
        trained = sum(p.numel() for p in self.controlnet.parameters())
        return pictures * own + task.activation_bytes(self.net.config, self.config, pictures, trained)

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(batches, lambda batch, chance: {
            "loss": self.losses(batch, chance, VALIDATION)})

    previews = property(task.previews)

    @property
    def of_pictures(self) -> bool:
        return not self.hints.of

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               conditions: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures of prompts, (B, 3, H, W) in [-1, 1], in two passes where there is a guide; the hints act on the
        first. The release draws with shift 2 and cfg 1. conditions: (B, 3, H, W) uint8 by name, pictures whose edges
        are taken by "canny" or ""; without them, recipe.sample_hints."""
        d = self.denoising
        sizes = sampling.sizes(height, width)
        cells = sizes.stage_c if self.guide is None else sizes.low
        size = tuple(task.PIXELS * n for n in cells)  # a cell of the hint is one of the latent, as in training
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
        return d.sample(what, height, width, steps, shift, cfg, seed, self.guide, control=control)

    def network(self) -> dict:
        return self.controlnet.config.as_dict()

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        net = self.controlnet
        return {"controlnet/{name}.safetensors": (net.state_dict(), checkpoint.metadata(net.config))}
