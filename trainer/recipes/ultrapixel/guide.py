"""UltraPixel's guide (arXiv 2407.02158): the modules that turn features of a low-resolution pass into those of a large
picture. Stage C stays as it is.

From the released guide, from one of ours, or from nothing.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import GuideConfig
from ....models_impl.ultrapixel.guidance import Guide
from ...config import Config
from ...training.noise import VALIDATION
from . import encoders, loss_weight, networks, settings, task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "ultrapixel_guide"
    dropout: float = 0.05
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is told beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Of the loss, by its noise level. adaptive: one over a running mean of what the loss was there, as the release;
    p2: the noise level's own (arXiv 2204.00227); none. The loss in the log is weighted, that of validation never."""
    low_side: int = 24
    """Cells along a side of the low-resolution latents, of a square; 32 pixels each."""
    low_filter: str = "nearest"
    """How the low-resolution picture is made of the other: nearest, as the release, or antialias."""
    width: int = 1024
    """Of a guide that starts from nothing, as everything below."""
    heads: int = 32
    feedforward: int = 1024
    max_tokens: int = 1024
    """Cells that a low-resolution latent may have."""
    groups: int = 64
    layers: list[int] | None = None
    """Outputs of the layers of the implicit function; without it the released [1024, 1024]."""


def shape_of(config: Config, stage_c) -> GuideConfig:
    """Of the guide in init_from, else of [recipe]. Raises ValueError where it does not fit Stage C."""
    if config.init_from:
        found = networks.read(config.init_from, checkpoint.read_guide)[0]
        networks.fitting(found, stage_c, f"init_from={config.init_from}")
        return found
    s = config.recipe
    more = {"layers": tuple(s.layers)} if s.layers else {}
    return GuideConfig(down=stage_c.hidden, up=tuple(reversed(stage_c.hidden)), width=s.width, heads=s.heads,
                       feedforward=s.feedforward, max_tokens=s.max_tokens, groups=s.groups,
                       timestep_dim=stage_c.timestep_dim, **more)


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae", "memory.base")

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again; without it, [model] and init_from say it."""
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        low = encoders.Low(config.recipe.low_side, config.recipe.low_filter)
        self.net = networks.base(config, reopened=bool(network))
        shape = GuideConfig.from_dict(network) if network else shape_of(config, self.net.config)
        self.guide = Guide(shape, operations=networks.Cast).initialise()
        if config.init_from and not network:
            tensors = networks.read(config.init_from, checkpoint.read_guide)[1]
            state_dict.load_into(self.guide, tensors, f"the guide ({config.init_from})")
        self.weight = loss_weight.LossWeight(config.recipe.weight, config.batch_size)
        self.encoders = self.make_encoders(config)
        self.denoising = task.Denoising(config, self.net, text, self.encoders, low)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """What makes features of pictures, and keeps them (`cache`)."""
        low = encoders.Low(config.recipe.low_side, config.recipe.low_filter)
        return encoders.make_encoders(config, low, writer)

    @staticmethod
    def problems(config: Config) -> list[str]:
        found = task.problems(config) + task.problems_of_loss(config.recipe)
        found += task.problems_of_low(config)
        there = all(Path(p).expanduser().is_file() for p in (config.model.stage_c, config.init_from) if p)
        if config.model.stage_c and there and not any(p.startswith("[model]") for p in found):
            try:
                shape = shape_of(config, networks.read(config.model.stage_c)[0])
                if config.recipe.low_side**2 > shape.max_tokens:
                    found.append(f"recipe.low_side={config.recipe.low_side} makes {config.recipe.low_side**2} cells, "
                                 f"the guide takes {shape.max_tokens}.")
            except ValueError as error:
                found.append(str(error))
        return found

    def groups(self, config: Config) -> list[dict]:
        """Parameters that learn, with their rates."""
        return task.groups({"guide": (self.guide, 1.0)})

    def forward(self, batch) -> Tensor:
        """Loss of each picture times the weight of its noise level, (B,)."""
        d = self.denoising
        chance = d.draw(batch.step).part(batch.positions)
        loss = d.guided(self.guide, d.latents(batch, d.seed), chance.t, d.told(batch, chance))
        return self.weight(d.schedule.logsnr(chance.t), loss, batch)

    def compile_blocks(self):
        task.compile_blocks(self.net)

    def described(self, step: int) -> list[str]:
        """What chance decides about each picture of a step's batch, in words."""
        return self.denoising.draw(step).described()

    def buckets(self, step: int) -> list[str]:
        return task.sizes(self.config, self.denoising.low)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return task.activation_bytes(self.net.config, self.config, pictures,
                                           sum(p.numel() for p in self.guide.parameters()))

    def validate(self, batches: list) -> dict[str, float]:
        d = self.denoising
        return d.validate(batches, lambda batch, chance: {"loss": d.guided(
            self.guide, d.latents(batch, VALIDATION), chance.t, d.told(batch, chance))})

    previews = property(task.previews)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Pictures of prompts, (B, 3, H, W) in [-1, 1], in two passes. shift is 1 for the release."""
        return self.denoising.sample(what, height, width, steps, shift, cfg, seed, self.guide)

    def network(self) -> dict:
        return self.guide.config.as_dict()

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        return {"model_patches/{name}.safetensors": (self.guide.state_dict(), checkpoint.metadata(self.guide.config))}
