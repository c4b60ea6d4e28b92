"""What the settings of a recipe say about it before anything heavy is imported."""
from __future__ import annotations

from typing import ClassVar

from ..config import rules
from ..config.problems import Problems
from ..config.schema import Config
from ..data import buckets

OWN_LOSS = "its loss and what is drawn for it are its own"


class Settings:
    """The base of every dataclass of [recipe]: its fields are the settings, and what stands here is the default."""

    name: ClassVar[str]
    """In [recipe]."""
    module: ClassVar[str]
    """Whose class `Recipe` it is: "pixart.lora"."""
    Model: ClassVar[type]
    """The dataclass of [model]."""
    sections: ClassVar[tuple[str, ...]] = ()
    """Which of "vae", "adapter", "memory.base" and "text.padded" the recipe reads."""
    unread: ClassVar[dict[str, str]] = {"noise": OWN_LOSS, "loss": OWN_LOSS, "data.masks": OWN_LOSS}
    """Which of the sections "noise" and "loss", of their settings ("noise.shift") and "data.masks" the recipe does not
    read, and why."""
    needs: ClassVar[str] = ""
    """"pictures" where neither captions nor classes are read."""
    lora: ClassVar[bool | None] = None
    """Whether an adapter is trained, where that can be chosen."""
    choices: ClassVar[int] = 1
    """Ways through the network in one batch."""
    draws_class_pictures: ClassVar[bool] = False
    """Whether the network draws pictures of captions before it has learned (data.prior_count)."""
    hints: ClassVar[list[str] | None] = None
    """Pictures for the samples, one for each prompt, where a recipe has such a setting."""

    @property
    def has_strength(self) -> bool:
        """Whether what is trained can count more or less in samples."""
        return self.has_adapter

    def guides(self, config: Config) -> bool:
        """Whether samples may be guided away from a negative prompt."""
        return True

    def hint_names(self, config: Config) -> list[str]:
        """The pictures that a sample may follow: names of conditions, "" for one that annotators draw from."""
        return []

    @property
    def has_frozen_network(self) -> bool:
        return "memory.base" in self.sections and self.lora is not False

    @property
    def has_adapter(self) -> bool:
        return "adapter" in self.sections and self.lora is not False

    def problems(self, config: Config) -> list[str]:
        """Everything wrong that shows without looking into a file; `rules.problems` has said the rest."""
        return []

    def bases(self, config: Config) -> list[str]:
        """Files of networks that the result stands on, beside init_from; some may be empty."""
        return []


def sizes(config: Config, multiple: int, remark: str = "") -> list[str]:
    """Problems with the sizes that a network is to take: squares, buckets and samples. remark: where the multiple is
    from."""
    problems, data = Problems(), config.data
    name = f"data.resolution{'s' * bool(data.resolutions)}"
    squares = [] if data.buckets else [(name, side) for side in data.sides]
    tables = [(f"samples.prompts.{i}.{side}", size) for i, one in config.samples.tables.items()
              for side, size in (("height", one.height), ("width", one.width)) if size is not None]
    for name, side in (*squares, ("samples.height", config.samples.height), ("samples.width", config.samples.width),
                       *tables):
        problems.need(side % multiple == 0, f"{name}={side} is not a multiple of {multiple}{remark}.")
    if data.buckets and not rules.data(data, config.batch_size, config.micro_batch_size):
        odd = [size for size in buckets.sizes(data) if size[0] % multiple or size[1] % multiple]
        problems += [f"data.buckets={data.buckets!r} has sizes such as {width}x{height}, no multiples of {multiple}"
                     f"{remark}: take \"area\" with a data.bucket_multiple." for height, width in odd[:1]]
    return problems
