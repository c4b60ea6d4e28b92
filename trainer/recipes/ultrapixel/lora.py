"""A LoRA of Stage C's attentions (arXiv 2106.09685): a style or a thing, with or without a word of its own.

With a guide, as UltraPixel is personalised: half of the steps at low resolution, half guided at high resolution, so
that the LoRA serves both passes. Without one, Stage C alone at the pictures' own size.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl.state_dict import read_file
from ....models_impl.ultrapixel import lora
from ....models_impl.ultrapixel.config import StageCConfig
from ....models_impl.ultrapixel.model import StageC
from ...config import Config
from ...training.noise import VALIDATION
from . import encoders, loss_weight, networks, settings, task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "ultrapixel_lora"
    rank: int = 4
    alpha: float = 1.0
    """The change is alpha / rank * up @ down."""
    word: str = ""
    """A word that the text encoder learns, such as "[roubaobao]"; the captions must have it. Empty: none."""
    word_base: str = ""
    """What the word begins as: the mean of the encoder's words that this pattern is found in, such as "^cat</w>"."""
    dropout: float = 0.05
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is told beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Of the loss, by its noise level: adaptive, p2 or none, as for ultrapixel_guide."""
    high_share: float = 0.5
    """With model.guide: share of the steps that are guided, at high resolution ..."""
    low_until: int = 5000
    """... after so many steps at low resolution alone."""
    low_side: int = 24
    """With model.guide: cells along a side of the low-resolution latents, of a square; 32 pixels each."""
    low_filter: str = "nearest"
    """nearest, as the release, or antialias."""


class LowRank(nn.Module):
    """What is added to the result of a linear layer. It begins as nothing: `down` is zero, as released."""

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.up, self.down = nn.Parameter(torch.randn(outputs, rank)), nn.Parameter(torch.zeros(rank, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down.to(x)), self.up.to(x))


def add(low_rank: LowRank, layer: nn.Module, given: tuple, said: Tensor) -> Tensor:
    return said + low_rank(given[0])


def start(config: Config, shape: StageCConfig) -> lora.Personalisation:
    """The LoRA in init_from. Raises ValueError where it is none, or of another rank or net."""
    path, rank = Path(config.init_from).expanduser(), config.recipe.rank
    found = lora.read(*read_file(path), shape)
    if set(found.layers) != set(lora.attention_keys(shape)):
        raise ValueError(f"{path.name} changes {len(found.layers)} layers, this Stage C has "
                         f"{len(lora.attention_keys(shape))} to change.")
    if (theirs := next(iter(found.layers.values()))[1].shape[0]) != rank:
        raise ValueError(f"{path.name} has rank {theirs}, recipe.rank={rank}: make them equal.")
    if bool(found.token_rows) != bool(config.recipe.word):
        raise ValueError(f"{path.name} {'has' if found.token_rows else 'has no'} word {found.token or ''} that was "
                         f"learned, recipe.word={config.recipe.word!r}: make them equal.")
    return found


class Recipe(nn.Module):
    Settings, Model, sections = Settings, settings.Model, ("vae", "memory.base")

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again; without it, [model] and init_from say it."""
        super().__init__()
        s = self.settings = config.recipe
        self.config, self.text = config, text
        self.net = networks.base(config, reopened=bool(network))
        self.shape = StageCConfig.from_dict(network) if network else self.net.config
        self.guide = networks.guide_of(config)
        self.scale = s.alpha / s.rank
        with torch.device("meta"):
            layers = dict((self.net or StageC(self.shape)).named_modules())
        self.layers, self.keys = nn.ModuleDict(), {}
        for key in lora.attention_keys(self.shape):
            layer = layers[key.removesuffix(".weight")]
            name = key.removesuffix(".weight").replace(".", "/")
            self.layers[name] = LowRank(*layer.weight.shape, s.rank, self.scale)
            self.keys[name] = key
            layer.register_forward_hook(partial(add, self.layers[name]))
        self.change = None
        if s.word:
            text.teach(s.word, lora.base_rows(text.tokens.get_vocab(), s.word_base))
            self.change = nn.Parameter(torch.zeros(1, text.width))
        if config.init_from and not network:
            self.begin(start(config, self.shape))
        self.weight = loss_weight.LossWeight(s.weight, config.batch_size)
        self.encoders = self.make_encoders(config)
        self.denoising = task.Denoising(config, self.net, text, self.encoders, low_of(config))

    @torch.no_grad()
    def begin(self, found: lora.Personalisation):
        for name, key in self.keys.items():
            up, down = found.layers[key]
            self.layers[name].up.copy_(up.float() * (found.scale / self.scale))
            self.layers[name].down.copy_(down)
        if self.change is not None:
            self.change.copy_(found.token_change)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """What makes features of pictures, and keeps them (`cache`)."""
        return encoders.make_encoders(config, low_of(config), writer)

    @staticmethod
    def problems(config: Config) -> list[str]:
        found, s = task.problems(config) + task.problems_of_loss(config.recipe), config.recipe
        if config.model.guide:
            found += task.problems_of_low(config)
        if s.rank < 1:
            found.append(f"recipe.rank={s.rank} must be at least 1.")
        if s.alpha <= 0:
            found.append(f"recipe.alpha={s.alpha} must be more than 0.")
        if bool(s.word) != bool(s.word_base):
            found.append(f"recipe.word={s.word!r} and recipe.word_base={s.word_base!r} belong together: a new word "
                         "begins as the mean of known ones (\"^cat</w>\").")
        if any(c.isspace() for c in s.word):
            found.append(f"recipe.word={s.word!r} must be one word.")
        if not 0 <= s.high_share <= 1:
            found.append(f"recipe.high_share={s.high_share} is outside [0, 1].")
        if s.low_until < 0:
            found.append(f"recipe.low_until={s.low_until} must not be negative.")
        files = [Path(p).expanduser() for p in (config.model.stage_c, config.init_from)]
        said = any(p.startswith("[model]") for p in found)
        if config.init_from and all(f.is_file() for f in files) and not said:
            try:
                start(config, networks.read(config.model.stage_c)[0])
            except ValueError as error:
                found.append(f"init_from={config.init_from}: {error}")
        return found

    def groups(self, config: Config) -> list[dict]:
        """Parameters that learn, with their rates; text.rate is the word's."""
        found = task.groups({"layers": (self.layers, 1.0)})
        if self.change is not None:
            found.append({"params": [("change", self.change)], "rate": config.text.rate, "matrices": set()})
        return found

    def high(self, step: int) -> bool:
        """Whether a step is guided, at high resolution."""
        s = self.settings
        return self.guide is not None and step >= s.low_until and self.denoising.draw(step).turn < s.high_share

    def forward(self, batch) -> Tensor:
        """Loss of each picture times the weight of its noise level, (B,)."""
        d = self.denoising
        chance = d.draw(batch.step).part(batch.positions)
        told = d.told(batch, chance, self.change)
        loss = self.loss(d.latents(batch, d.seed), chance.t, told, self.high(batch.step))
        return self.weight(d.schedule.logsnr(chance.t), loss, batch)

    def loss(self, latents: task.Latents, t: Tensor, told: dict, high: bool) -> Tensor:
        if high:
            return self.denoising.guided(self.guide, latents, t, told)
        if latents.low is not None:
            return self.denoising.plain(latents.low, latents.noise_low, t, told)
        return self.denoising.plain(latents.high, latents.noise, t, told)

    def compile_blocks(self):
        task.compile_blocks(self.net)

    def described(self, step: int) -> list[str]:
        """What chance decides about each picture of a step's batch, in words."""
        where = "" if self.guide is None else ", guided" if self.high(step) else ", low resolution"
        return self.denoising.draw(step).described(where)

    def buckets(self, step: int) -> list[str]:
        return task.sizes(self.config, self.denoising.low)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return task.activation_bytes(self.net.config, self.config, pictures)

    def validate(self, batches: list) -> dict[str, float]:
        d = self.denoising

        def losses(batch, chance):
            latents, told = d.latents(batch, VALIDATION), d.told(batch, chance, self.change)
            turns = {"loss": False} if self.guide is None else {"low": False, "high": True}
            return {name: self.loss(latents, chance.t, told, high) for name, high in turns.items()}

        return d.validate(batches, losses)

    previews = property(task.previews)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Pictures of prompts, (B, 3, H, W) in [-1, 1], in two passes where there is a guide. shift is 1 for the
        release."""
        return self.denoising.sample(what, height, width, steps, shift, cfg, seed, self.guide, self.change)

    def network(self) -> dict:
        return self.shape.as_dict()

    def personalisation(self) -> lora.Personalisation:
        layers = {key: (self.layers[name].up.detach(), self.layers[name].down.detach())
                  for name, key in self.keys.items()}
        if self.change is None:
            return lora.Personalisation(layers, self.scale)
        return lora.Personalisation(layers, self.scale, [self.text.word_row], self.change.detach(), self.settings.word,
                                    self.settings.word_base)

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        tensors, metadata = lora.to_core(self.personalisation())
        return {"loras/{name}.safetensors": (tensors, {"pixstack.family": "ultrapixel.lora", **metadata})}


def low_of(config: Config) -> encoders.Low | None:
    return encoders.Low(config.recipe.low_side, config.recipe.low_filter) if config.model.guide else None
