"""Settings of the recipe flux, and what every recipe on a FLUX needs. No torch here."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ....models_impl.flux.config import FluxConfig
from ...config.problems import Problems
from ...config.schema import Config
from ..settings import Settings, sizes

CELL = 16  # pixels along a side of a token


@dataclass(frozen=True)
class Model:
    hidden: int = 384
    """Without init_from, which says all of this itself: the width of the transformer ..."""
    heads: int = 3
    axes: list[int] = field(default_factory=lambda: [16, 56, 56])
    """Channels of a head that turn with index, row and column; they add up to hidden / heads."""
    mlp_hidden: int = 1536
    depth: int = 4
    """Blocks with separate text and image streams."""
    single_depth: int = 4
    """Blocks on both joined."""
    channels: int = 16
    """Channels of the latent."""
    pooled_dim: int = 768
    guidance: bool = False
    """Whether the guidance is an input."""


@dataclass(frozen=True)
class FluxSettings(Settings):
    name: ClassVar[str] = "flux"
    module: ClassVar[str] = "flux.recipe"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "text.padded")
    unread: ClassVar[dict[str, str]] = {}
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    guidance: float = 1.0
    """Guidance that a distilled network (dev) is conditioned on while training."""

    def guides(self, config: Config) -> bool:
        return not config.model.guidance  # a distilled network is conditioned on it instead

    def problems(self, config: Config) -> list[str]:
        problems, shape = Problems(), None
        if not config.init_from:
            try:
                shape = new_shape(config, config.text.width)
            except ValueError as error:
                problems.append(str(error))
        problems.dropout(self.dropout)
        return problems + of_family(config) + (of_shape(config, shape) if shape else [])


RECIPES = {FluxSettings.name: FluxSettings}


def new_shape(config: Config, text_width: int) -> FluxConfig:
    """Shape of a network that starts from nothing. Raises ValueError for nonsense."""
    m = config.model
    return FluxConfig(hidden=m.hidden, heads=m.heads, axes=tuple(m.axes), mlp_hidden=m.mlp_hidden, depth=m.depth,
                      single_depth=m.single_depth, in_channels=4 * m.channels, pooled_dim=m.pooled_dim,
                      context_dim=text_width, guidance=m.guidance)


def of_family(config: Config) -> list[str]:
    """What every recipe on FLUX needs."""
    problems = Problems()
    problems.need(config.text.encoder,
                  "text.encoder is empty: FLUX reads captions. Name the folder of its T5, or a text encoder.")
    problems.need(not config.text.encoder or config.text.padded,
                  "text.padded=false: FLUX attends to all of text.max_length tokens, padding included. Set "
                  "text.padded=true.")
    problems.need(config.vae.path,
                  "vae.path is empty: FLUX draws latents. Name its VAE, a folder or a .safetensors file.")
    problems.need(not config.samples.classes, "samples.classes is for class-conditional runs: use samples.prompts.")
    return problems + sizes(config, CELL)


def of_shape(config: Config, shape: FluxConfig) -> list[str]:
    """What a FLUX of this shape cannot take."""
    problems = Problems()
    problems.need(config.text.encoder != "small" or config.text.width == shape.context_dim,
                  f"text.width={config.text.width}, and this FLUX reads tokens of width {shape.context_dim}.")
    return problems
