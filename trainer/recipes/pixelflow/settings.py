"""Settings of the recipe pixelflow, and what is wrong with them. No torch here."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....models_impl.pixelflow.config import PRESETS, PixelFlowConfig
from ...config import rules
from ...config.problems import Problems, nearest
from ...config.schema import Adapter, Config
from ..settings import Settings, sizes

DIVIDED = "its stages divide the noise levels, and recipe.stage_weights says how often each is drawn"
WHITE = "the jumps between its stages presume white noise"
NO_SNR = "the states of a stage mix pictures of two resolutions, for which a signal-to-noise ratio is not defined"
UNREAD = {
    **dict.fromkeys(("noise.shift", "noise.min_timestep", "noise.max_timestep", "noise.quarters"), DIVIDED),
    **dict.fromkeys(("noise.offset", "noise.pyramid", "noise.perturbation"), WHITE),
    **dict.fromkeys(("loss.snr_gamma", "loss.debiased", "loss.huber_schedule"), NO_SNR),
}


@dataclass(frozen=True)
class Model:
    preset: str = ""
    """A released shape; the settings below replace its values."""
    heads: int | None = None
    head_dim: int | None = None
    depth: int | None = None
    patch_size: int | None = None
    num_stages: int | None = None
    attention_bias: bool | None = None


@dataclass(frozen=True)
class PixelFlowSettings(Settings):
    name: ClassVar[str] = "pixelflow"
    module: ClassVar[str] = "pixelflow.recipe"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("adapter", "memory.base")
    unread: ClassVar[dict[str, str]] = UNREAD
    dropout: float = 0.1
    """How often a picture's class or caption is replaced by none."""
    stage_weights: list[float] | None = None
    """Share of the pictures that each stage gets; without it, near-equal counts (the paper)."""
    lora: bool = False
    """Train the adapter of [adapter] on the network of init_from, and nothing else of it."""
    trunk: bool = False
    """Take only what networks for text and for classes have in common out of init_from; the class table or the
    cross-attention starts anew. So a network of classes begins with one that has learned to draw from captions."""
    packing: str = "auto"
    """packed: all stages in one pass through packed attention. dense: one pass per stage, the same result. auto: packed
    on a GPU, dense on a CPU, where it is the faster one."""

    def guides(self, config: Config) -> bool:
        return bool(config.text.encoder)

    def problems(self, config: Config) -> list[str]:
        problems, text, samples = Problems(), config.text.encoder, config.samples
        problems.dropout(self.dropout)
        problems.one_of("recipe.packing", self.packing, ("auto", "packed", "dense"))
        if self.lora:
            problems += rules.adapter(config.adapter)
            problems.need(config.init_from,
                          "init_from is empty: recipe.lora=true trains on a network that is there already.")
            problems.need(not self.trunk, "recipe.lora and recipe.trunk are both true: an adapter stands on a network "
                                          "that is whole, so train that one first.")
        else:
            problems.need(config.adapter == Adapter(), "[adapter] is read only with recipe.lora=true.")
        if self.trunk:
            problems.need(config.init_from, "init_from is empty: recipe.trunk=true says what to take out of it.")
        try:
            requested(config.model)
            problems += [] if config.init_from else of_shape(config, new_shape(config))
        except ValueError as error:
            problems.append(str(error))
        problems.need(not (text and samples.classes),
                      "samples.classes is for class-conditional runs, this one has a text "
                      "encoder: use samples.prompts.")
        problems.need(not (samples.classes and samples.tables),
                      "samples.classes and [[samples.prompts]] both name classes: use one of them.")
        problems.need(text or not any(samples.texts),
                      "samples.prompts needs a text encoder: set text.encoder, or use samples.classes.")
        problems.need(text or all(one.kind != "folder" for one in config.data.each),
                      "data.kind=\"folder\" has no classes: use \"classes\", or set text.encoder for captions.")
        return problems


RECIPES = {PixelFlowSettings.name: PixelFlowSettings}


def requested(model: Model) -> dict:
    """What [model] asks for, a preset filled in."""
    preset, given = model.preset, {k: v for k, v in vars(model).items() if v is not None}
    if preset and preset not in PRESETS:
        raise ValueError(f"model.preset={preset!r} is none of {', '.join(PRESETS)}{nearest(preset, PRESETS)}.")
    return {**(PRESETS[preset].as_dict() if preset else {}), **{k: v for k, v in given.items() if k != "preset"}}


def shape_of(known: dict) -> PixelFlowConfig:
    """known: the entries of a PixelFlowConfig, from [model] or from a file. The resolution stands at the smallest
    possible, for data.resolution decides. Raises ValueError for nonsense."""
    smallest = known.get("patch_size", 4) * 2 ** max(known.get("num_stages", 4) - 1, 0)
    return PixelFlowConfig(**{**known, "resolution": max(smallest, 1)})


def new_shape(config: Config) -> PixelFlowConfig:
    """Shape of a network that starts from nothing. Raises ValueError where [model] does not say enough."""
    known = requested(config.model)
    if missing := [k for k in ("heads", "head_dim", "depth") if k not in known]:
        raise ValueError(f"[model] needs a preset ({', '.join(PRESETS)}), or {', '.join(missing)}.")
    return shape_of(known)


def of_shape(config: Config, shape: PixelFlowConfig) -> list[str]:
    """What a network of this shape cannot take."""
    problems = Problems(sizes(config, shape.size_multiple, " (patch size times 2^(stages-1))"))
    weights = config.recipe.stage_weights
    problems.need(weights is None or (len(weights) == shape.num_stages and min(weights) >= 0 and sum(weights) > 0),
                  f"recipe.stage_weights={weights} must be {shape.num_stages} numbers that are not negative, because "
                  f"the model has {shape.num_stages} stages.")
    return problems
