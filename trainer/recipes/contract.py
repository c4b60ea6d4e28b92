"""What a recipe is to the loop, the run, the commands and the export.

Recipes are torch modules whose `forward` is the loss. They are not made of one another: what the recipes of a family
share is in its task.py, and what several families need has a module of its own (adapters.py).
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from ..config.schema import Config
from ..data.layouts import Item
from ..data.loader import Batch
from ..training.ema import EmaWeights
from ..training.groups import Group
from . import adapters
from .settings import Settings

Files = dict[str, tuple[dict[str, Tensor], dict[str, str]]]
"""Path, with {name} for the name of the export -> (tensors, metadata)."""


class Encoder(Protocol):
    """A frozen encoder of pictures, whose features a cache may keep."""

    name: str
    of: str
    """"" for the picture, or the name of a condition."""
    store: Any
    """A `features.store.Store`, or None where nothing is kept."""

    def encode(self, pictures: Tensor, device) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> part: (B, ...)."""


class Recipe(Protocol):
    settings: Settings
    config: Config
    text: nn.Module | None
    """The text encoder, which may learn."""
    encoders: Sequence[Encoder]
    """What `make_encoders` made."""
    teacher: Sequence[nn.Module]
    """Frozen networks that are no part of the run folder, and are counted as memory."""
    ema: EmaWeights | None
    """The moving average of the weights, which the loop sets."""
    whole: Sequence[str]
    """Modules that are called part by part, which FSDP2 must leave whole in each process."""
    previews: bool
    """Whether samples may be smaller than what was asked for."""
    of_pictures: bool
    """Whether `sample` makes hints of pictures, conditions[""]."""

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` returned, of a run that is opened again; without it, [model] and files say it."""

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        """Everything wrong with the files that the settings name, which are there."""

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list[Encoder]:
        """writer: the number of the process, which writes features of its own."""

    def look_at(self, items: list[Item]):
        """The training set, before training begins. Raises ValueError where it cannot be trained on."""

    def groups(self, config: Config) -> list[Group]:
        """What learns."""

    def forward(self, batch: Batch) -> Tensor:
        """The loss of each picture, (B,)."""

    def compile_blocks(self, **how):
        """With compile=true. how: arguments of torch.compile."""

    def described(self, step: int) -> list[str]:
        """The random draws for each picture of a step's batch, in words."""

    def buckets(self, step: int) -> list[str]:
        """The batch of a step in words."""

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        """What a forward pass of so many pictures keeps for the backward pass, estimated."""

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """"loss", and other means over held-out pictures, with noise that never changes."""

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """(B, 3, H, W) in [-1, 1]. what: prompts, classes or picture files. negative: the prompt that guidance leads
        away from, where the settings' `guides` says that there is one. A recipe with data.conditions or `of_pictures`
        also takes conditions, name -> (B, 3, H, W) uint8."""

    def at_strength(self, strength: float) -> AbstractContextManager:
        """Inside, what an adapter changes counts so many times; only asked for where the settings say
        `has_strength`."""

    def network(self) -> dict:
        """The shape of what is trained, for the run folder."""

    def files(self) -> Files:
        """What export writes."""


class Base(nn.Module):
    """Defaults of what a recipe need not define."""

    encoders: Sequence[Encoder] = ()
    teacher: Sequence[nn.Module] = ()
    ema: EmaWeights | None = None
    whole: Sequence[str] = ()
    previews = False
    of_pictures = False

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        return []

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list[Encoder]:
        return []

    def look_at(self, items: list[Item]):
        pass

    def at_strength(self, strength: float) -> AbstractContextManager:
        return adapters.at_strength(self, strength)

    def blocks(self) -> list[nn.Module]:
        """What compile=true compiles, one by one."""
        return []

    def compile_blocks(self, **how):
        for block in self.blocks():
            block.compile(**how)
