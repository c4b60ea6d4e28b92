"""A LoRA of Stage C's attentions (arXiv 2106.09685): a style or a thing, with or without a word of its own.

With a guide, as UltraPixel is personalised: half of the steps at low resolution, half guided at high resolution, so
that the LoRA serves both passes. Without one, only Stage C at the pictures' own size.
"""
from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl.guard import reading
from ....models_impl.state_dict import read_file
from ....models_impl.ultrapixel import lora
from ....models_impl.ultrapixel.config import StageCConfig
from ....models_impl.ultrapixel.model import StageC
from ...config.schema import Config
from ...training.groups import Group, groups
from ...training.noise import VALIDATION
from ..contract import Files
from .encoders import Low, make_encoders
from .networks import base, guide_of, read
from .task import BothLatents, StageCRecipe, file_problems, in_transformer

RANK = 4  # where neither the settings nor a file say one


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
    with reading(path), torch.device("cpu"):  # a dry run makes networks without memory, and reads the file
        found = lora.read(*read_file(path), shape)
    if set(found.layers) != set(lora.attention_keys(shape)):
        raise ValueError(f"{path.name} changes {len(found.layers)} layers, this Stage C has "
                         f"{len(lora.attention_keys(shape))} to change.")
    if rank not in (None, rank_of(found)):
        raise ValueError(f"{path.name} has rank {rank_of(found)}, recipe.rank={rank}: make them equal.")
    if bool(found.token_rows) != bool(config.recipe.word):
        raise ValueError(f"{path.name} {'has' if found.token_rows else 'has no'} word {found.token or ''} that was "
                         f"learned, recipe.word={config.recipe.word!r}: make them equal.")
    return found


def rank_of(found: lora.Personalisation) -> int:
    return next(iter(found.layers.values()))[1].shape[0]


class Recipe(StageCRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text, base(config, reopened=bool(network)))
        s = self.settings
        self.shape = StageCConfig.from_dict({k: v for k, v in network.items() if k != "rank"}) if network \
            else self.net.config
        self.guide = guide_of(config)
        begun = start(config, self.shape) if config.init_from and not network else None
        # A run that is opened again knows the rank of the file that it began with.
        self.rank = (network or {}).get("rank") or s.rank or (rank_of(begun) if begun else RANK)
        self.scale, self.strength = s.alpha / self.rank, 1.0
        with torch.device("meta"):
            layers = dict((self.net or StageC(self.shape)).named_modules())
        self.layers, self.keys = nn.ModuleDict(), {}
        for key in lora.attention_keys(self.shape):
            layer = layers[key.removesuffix(".weight")]
            name = key.removesuffix(".weight").replace(".", "/")
            self.layers[name] = LowRank(*layer.weight.shape, self.rank, self.scale)
            self.keys[name] = key
            layer.register_forward_hook(partial(add, self.layers[name]))
        self.change = None
        if s.word:
            text.teach(s.word, lora.base_rows(text.tokens.get_vocab(), s.word_base))
            self.change = nn.Parameter(torch.zeros(1, text.width))
        if begun:
            self.begin(begun)
        self.prepare(low_of(config))

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
        return make_encoders(config, low_of(config), writer)

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        problems = file_problems(config)
        if config.init_from and not any(p.startswith("[model]") for p in problems):
            try:
                start(config, read(config.model.stage_c)[0])
            except ValueError as error:
                problems.append(f"init_from={config.init_from}: {error}")
        return problems

    def groups(self, config: Config) -> list[Group]:
        """text.learning_rate_multiple is the word's."""
        word = [] if self.change is None else [Group([("change", self.change)], config.text.learning_rate_multiple)]
        return groups(self, {"layers": 1.0}, in_transformer) + word

    def high(self, step: int) -> bool:
        """Whether a step is guided, at high resolution."""
        s = self.settings
        return self.guide is not None and step >= s.low_until and self.denoising.draw(step).turn < s.high_share

    def forward(self, batch) -> Tensor:
        d = self.denoising

        def loss(draws) -> Tensor:
            condition = d.conditioning(batch, draws, self.change)
            return self.loss(d.latents(batch, d.seed), draws.t, condition, self.high(batch.step))

        return self.weighted(batch, loss)

    def loss(self, latents: BothLatents, t: Tensor, condition: dict, high: bool) -> Tensor:
        if high:
            return self.denoising.guided(self.guide, latents, t, condition)
        return self.denoising.plain(latents.high if latents.low is None else latents.low, t, condition)

    def described(self, step: int) -> list[str]:
        where = "" if self.guide is None else ", guided" if self.high(step) else ", low resolution"
        return self.denoising.draw(step).described(where)

    def validate(self, batches: list) -> dict[str, float]:
        d = self.denoising

        def losses(batch, draws):
            latents, condition = d.latents(batch, VALIDATION), d.conditioning(batch, draws, self.change)
            turns = {"loss": False} if self.guide is None else {"low": False, "high": True}
            return {name: self.loss(latents, draws.t, condition, high) for name, high in turns.items()}

        return d.validate(batches, losses)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """In two passes where there is a guide. shift is 1 for the release."""
        return self.denoising.sample(what, height, width, steps, shift, cfg, seed, self.guide,
                                     None if self.change is None else self.strength * self.change, negative=negative)

    @contextmanager
    def at_strength(self, strength: float):
        """The word's change counts as the layers' do."""
        self.strength = strength
        for one in self.layers.values():
            one.scale = strength * self.scale
        try:
            yield
        finally:
            self.strength = 1.0
            for one in self.layers.values():
                one.scale = self.scale

    def network(self) -> dict:
        return {**self.shape.as_dict(), "rank": self.rank}

    def personalisation(self) -> lora.Personalisation:
        layers = {key: (self.layers[name].up.detach(), self.layers[name].down.detach())
                  for name, key in self.keys.items()}
        if self.change is None:
            return lora.Personalisation(layers, self.scale)
        return lora.Personalisation(layers, self.scale, [self.text.word_row], self.change.detach(), self.settings.word,
                                    self.settings.word_base)

    def files(self) -> Files:
        tensors, metadata = lora.to_core(self.personalisation())
        return {"loras/{name}.safetensors": (tensors, {"pixstack.family": "ultrapixel.lora", **metadata})}


def low_of(config: Config) -> Low | None:
    return Low(config.recipe.low_side, config.recipe.low_filter) if config.model.guide else None
