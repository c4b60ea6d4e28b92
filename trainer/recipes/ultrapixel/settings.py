"""Settings of the UltraPixel recipes, and what is wrong with them. No torch here."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ....models_impl.ultrapixel.config import ControlNetConfig
from ...config import rules
from ...config.problems import Problems, nearest
from ...config.schema import Config, look_up
from ...data import buckets
from ..settings import Settings

PIXELS = 32  # along a side of a cell of the latents that are trained on; at inference it is 42.67
WEIGHTS = ("adaptive", "p2", "none")
FILTERS = ("nearest", "antialias")
CANNY = "canny"


@dataclass(frozen=True)
class Model:
    stage_c: str = ""
    """The frozen base: Stage C of Stable Cascade, stage_c_bf16.safetensors. It is kept in bf16 unless precision says
    fp32."""
    guide: str = ""
    """UltraPixel's guide, ultrapixel_t2i.safetensors or one of ours: for sample pictures, and for the recipes that
    train through it. The guide that a run itself trains starts from init_from."""
    image_encoder: str = ""
    """A folder with CLIP-L's image tower (openai/clip-vit-large-patch14), whose embeddings are given beside some
    captions, as the releases were trained. Empty: none ever is."""
    previewer: str = ""
    """previewer.safetensors, for quick sample pictures of 8 pixels a cell."""
    stage_b: str = ""
    """stage_b_bf16.safetensors or the lite one, and ..."""
    stage_a: str = ""
    """... stage_a.safetensors, for sample pictures of full size."""


FILES = ("stage_c", "guide", "previewer", "stage_b", "stage_a")  # of Model


@dataclass(frozen=True)
class UltraPixelGuideSettings(Settings):
    name: ClassVar[str] = "ultrapixel_guide"
    module: ClassVar[str] = "ultrapixel.guide"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "memory.base")
    unread: ClassVar[dict[str, str]] = {}
    dropout: float = 0.05
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is given beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Weight of the loss, by its noise level. adaptive: one over a running mean of what the loss was there, as the
    release; p2: the noise level's own (arXiv 2204.00227); none. The loss in the log is weighted, that of validation
    never."""
    low_side: int = 24
    """Cells along a side of the low-resolution latents, of a square; 32 pixels each."""
    low_filter: str = "nearest"
    """How the low-resolution picture is made of the other: nearest, as the release, or antialias."""
    width: int = 1024
    """Width of a guide that starts from nothing, as everything below."""
    heads: int = 32
    feedforward: int = 1024
    max_tokens: int = 1024
    """Cells that a low-resolution latent may have."""
    groups: int = 64
    layers: list[int] | None = None
    """Outputs of the layers of the implicit function; without it the released [1024, 1024]."""

    def problems(self, config: Config) -> list[str]:
        return [*of_family(config), *of_loss(self.dropout, self.image_share, self.weight), *of_low(config)]

    def bases(self, config: Config) -> list[str]:
        return [config.model.stage_c, config.model.guide]


@dataclass(frozen=True)
class UltraPixelLoraSettings(Settings):
    name: ClassVar[str] = "ultrapixel_lora"
    module: ClassVar[str] = "ultrapixel.lora"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "memory.base")
    unread: ClassVar[dict[str, str]] = {}
    draws_class_pictures: ClassVar[bool] = True
    rank: int | None = None
    """Without it 4, or that of the LoRA in init_from."""
    alpha: float = 1.0
    """The change is alpha / rank * up @ down."""
    word: str = ""
    """A word that the text encoder learns, such as "[roubaobao]"; the captions must have it. Empty: none."""
    word_base: str = ""
    """What the word begins as: the mean of the encoder's words that this pattern is found in, such as "^cat</w>"."""
    dropout: float = 0.05
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is given beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Weight of the loss, by its noise level: adaptive, p2 or none, as for ultrapixel_guide."""
    high_share: float = 0.5
    """With model.guide: share of the steps that are guided, at high resolution ..."""
    low_until: int = 5000
    """... after so many steps at low resolution only."""
    low_side: int = 24
    """With model.guide: cells along a side of the low-resolution latents, of a square; 32 pixels each."""
    low_filter: str = "nearest"
    """nearest, as the release, or antialias."""

    @property
    def has_strength(self) -> bool:
        return True

    def problems(self, config: Config) -> list[str]:
        problems = Problems([*of_family(config), *of_loss(self.dropout, self.image_share, self.weight),
                             *(of_low(config) if config.model.guide else ())])
        problems.at_least("recipe.rank", 1 if self.rank is None else self.rank, 1)
        problems.above_zero("recipe.alpha", self.alpha)
        problems.need(bool(self.word) == bool(self.word_base),
                      f"recipe.word={self.word!r} and recipe.word_base={self.word_base!r} belong together: a new word "
                      "begins as the mean of known ones (\"^cat</w>\").")
        problems.need(not any(c.isspace() for c in self.word), f"recipe.word={self.word!r} must be one word.")
        problems.share("recipe.high_share", self.high_share)
        problems.at_least("recipe.low_until", self.low_until, 0)
        return problems

    def bases(self, config: Config) -> list[str]:
        return [config.model.stage_c, config.model.guide]


@dataclass(frozen=True)
class UltraPixelControlNetSettings(Settings):
    name: ClassVar[str] = "ultrapixel_controlnet"
    module: ClassVar[str] = "ultrapixel.controlnet"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "memory.base")
    unread: ClassVar[dict[str, str]] = {}
    hint: str = CANNY
    """canny: edges of the pictures themselves, sought at 224 x 224 as the released ControlNet knows them. Else one of
    data.conditions."""
    channels: int = 1
    """Channels of the hint: 1 takes the mean of a condition picture's colours, 3 the colours."""
    backbone: str = "effnet"
    """Backbone of a ControlNet that starts from nothing. effnet: EfficientNetV2-S, its weights taken from the encoder
    of vae.path; large or simple: new weights."""
    blocks: list[int] = field(default_factory=lambda: list(ControlNetConfig().blocks))
    """The ResBlocks that get a residual. ComfyUI's loader knows only these."""
    dropout: float = 0.05
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is given beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Weight of the loss, by its noise level: adaptive, p2 or none, as for ultrapixel_guide."""
    sample_hints: list[str] = field(default_factory=list)
    """Pictures whose hints the sample prompts get, in turn; for another hint than canny, the condition pictures."""

    def hint_names(self, config: Config) -> list[str]:
        return [""] if self.hint == CANNY else [self.hint]

    def problems(self, config: Config) -> list[str]:
        problems = Problems([*of_family(config), *of_loss(self.dropout, self.image_share, self.weight)])
        known = (CANNY, *config.data.conditions)
        problems.need(self.hint in known, f"recipe.hint={self.hint!r} is none of {', '.join(known)}"
                                          f"{nearest(self.hint, known)}: name it in data.conditions too.")
        problems.need(self.channels in (1, 3), f"recipe.channels={self.channels} must be 1 or 3.")
        tables = config.samples.tables
        own = len(tables) == len(config.samples.prompts) > 0 and all(one.hint for one in tables.values())
        problems.need(not config.samples.every or self.sample_hints or own,
                      f"samples.every={config.samples.every} draws pictures, and recipe.sample_hints names none to "
                      "take their hints from.")
        for path in self.sample_hints:
            problems.need(Path(path).expanduser().is_file(), f"recipe.sample_hints: there is no file {path!r}.")
        return problems

    def bases(self, config: Config) -> list[str]:
        return [config.model.stage_c, config.model.guide]


RECIPES = {kind.name: kind for kind in (UltraPixelGuideSettings, UltraPixelLoraSettings, UltraPixelControlNetSettings)}


def of_family(config: Config) -> list[str]:
    """What every UltraPixel recipe needs."""
    problems, model, text, samples = Problems(), config.model, config.text, config.samples
    for name in (*FILES, "image_encoder"):
        problems.exists(f"model.{name}", look_up(model, name))
    problems.need(model.stage_c,
                  "model.stage_c is empty: name Stage C of Stable Cascade (stage_c_bf16.safetensors), the "
                  "base that UltraPixel builds on.")
    problems.need(text.encoder, "text.encoder is empty: Stage C reads captions. Name the folder of CLIP-G's text tower "
                                "(text_encoder of stabilityai/stable-cascade, with its tokenizer).")
    problems.need(not text.encoder or text.frozen,
                  f"text.encoder={text.encoder!r}: Stage C reads CLIP-G, a folder as transformers saves it.")
    problems.need(config.vae.path,
                  "vae.path is empty: Stage C draws latents of Stable Cascade's semantic encoder. Name "
                  "effnet_encoder.safetensors.")
    problems.need(not samples.classes, "samples.classes is for class-conditional runs: use samples.prompts.")
    weight = "loss.snr_gamma" if config.loss.snr_gamma else "loss.debiased"
    problems.need(not (config.loss.snr_gamma or config.loss.debiased) or config.recipe.weight == "none",
                  f"recipe.weight={config.recipe.weight!r} and {weight} both weigh the loss by its noise level: set "
                  "recipe.weight=\"none\", or leave the other out.")
    problems.need(bool(model.stage_b) == bool(model.stage_a),
                  "model.stage_b and model.stage_a belong together: name both, or neither.")
    problems.need(not samples.every or model.previewer or model.stage_a,
                  f"samples.every={samples.every} asks for pictures, and nothing here makes pictures of latents: name "
                  "model.previewer, or model.stage_b and model.stage_a, or set it to 0.")
    if not rules.data(config.data, config.batch_size, config.micro_batch_size):
        odd = [size for size in buckets.sizes(config.data) if size[0] % PIXELS or size[1] % PIXELS]
        problems += [f"data.resolution has sizes such as {width}x{height}, which are no multiples of {PIXELS}: "
                     "data.buckets=\"ultrapixel\" has only such." for height, width in odd[:1]]
    for name, one in (("samples.", samples), *((f"samples.prompts.{i}.", t) for i, t in samples.tables.items())):
        for side in ("height", "width") if model.stage_b else ():
            size = look_up(one, side) or 0
            problems.need(size % 8 == 0, f"{name}{side}={size} is not a multiple of 8, which Stage B needs.")
    return problems


def of_loss(dropout: float, image_share: float, weight: str) -> list[str]:
    problems = Problems()
    problems.share("recipe.dropout", dropout)
    problems.share("recipe.image_share", image_share)
    problems.one_of("recipe.weight", weight, WEIGHTS)
    return problems


def of_low(config: Config) -> list[str]:
    """Problems with low_side and low_filter, where a recipe has them."""
    s, found, least = config.recipe, Problems(), min(config.data.sides)
    found.at_least("recipe.low_side", s.low_side, 1)
    found.one_of("recipe.low_filter", s.low_filter, FILTERS)
    found.need(s.low_side < 1 or least > PIXELS * s.low_side,
               f"data.resolution={least} is not larger than the low resolution, {PIXELS * s.low_side} pixels "
               f"(recipe.low_side={s.low_side} cells): there is nothing to guide.")
    return found
