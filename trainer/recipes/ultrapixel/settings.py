"""Settings of the UltraPixel recipes, and what is wrong with them. No torch here."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ....models_impl.ultrapixel.config import ControlNetConfig, StageAConfig, StageBConfig, StageCConfig
from ...config import rules
from ...config.problems import Problems, nearest
from ...config.schema import Config, look_up
from ...data import buckets
from ..autoencoder.settings import AutoencoderSettings
from ..settings import Settings, sizes

ENCODER_STAGES = 6  # of EfficientNetV2-S
STAGE_B_PIXELS = 8  # along a side of a patch of Stage B
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
class StageCModel(Model):
    hidden: list[int] = field(default_factory=lambda: [192, 192])
    """Without init_from, which says all of this itself: the width of each level ..."""
    heads: list[int] = field(default_factory=lambda: [3, 3])
    depth: list[int] = field(default_factory=lambda: [2, 6])
    """... and how many rounds of ResBlock, timestep and attention it has on the way down, and as many on the way up."""
    context_dim: int = 192
    """Width of the text in the attentions."""
    dropout: float = 0.0


class StageCSettings(Settings):
    """What the recipes on a Stage C have in common."""

    sections: ClassVar[tuple[str, ...]] = ("vae", "memory.base", "text.padded")
    unread: ClassVar[dict[str, str]] = {}
    teaches: ClassVar[bool] = False
    """Whether the text encoder may learn."""


@dataclass(frozen=True)
class UltraPixelGuideSettings(StageCSettings):
    name: ClassVar[str] = "ultrapixel_guide"
    module: ClassVar[str] = "ultrapixel.guide"
    Model: ClassVar[type] = Model
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
class UltraPixelLoraSettings(StageCSettings):
    name: ClassVar[str] = "ultrapixel_lora"
    module: ClassVar[str] = "ultrapixel.lora"
    Model: ClassVar[type] = Model
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
class UltraPixelControlNetSettings(StageCSettings):
    name: ClassVar[str] = "ultrapixel_controlnet"
    module: ClassVar[str] = "ultrapixel.controlnet"
    Model: ClassVar[type] = Model
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


@dataclass(frozen=True)
class UltraPixelStageCSettings(StageCSettings):
    name: ClassVar[str] = "ultrapixel_stage_c"
    module: ClassVar[str] = "ultrapixel.stage_c"
    Model: ClassVar[type] = StageCModel
    sections: ClassVar[tuple[str, ...]] = ("vae", "text.padded")
    teaches: ClassVar[bool] = True
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    image_share: float = 0.1
    """How often a picture's image embedding is given beside its caption; needs model.image_encoder."""
    weight: str = "adaptive"
    """Weight of the loss, by its noise level: adaptive, p2 or none, as for ultrapixel_guide."""

    def problems(self, config: Config) -> list[str]:
        problems = Problems([*of_family(config), *of_loss(self.dropout, self.image_share, self.weight)])
        problems.need(not config.model.guide, f"model.guide={config.model.guide!r}: a guide is trained on a Stage C "
                                              "that is finished: take it out.")
        if not config.init_from and not problems:
            try:
                new_stage_c(config, 1, 1)
            except ValueError as error:
                problems.append(f"[model]: {error}")
        return problems


def new_stage_c(config: Config, text: int, pooled: int) -> StageCConfig:
    """Shape of a Stage C that starts from nothing. text, pooled: widths of its texts. Raises ValueError."""
    m, levels = config.model, len(config.model.hidden)
    rounds = tuple("CTA" * n for n in m.depth)
    image = StageCConfig().image_dim if m.image_encoder else 1
    return StageCConfig(hidden=tuple(m.hidden), heads=tuple(m.heads), down=rounds, up=rounds[::-1],
                        down_repeats=(1,) * levels, up_repeats=(1,) * levels, context_dim=m.context_dim, text_dim=text,
                        pooled_dim=pooled, image_dim=image, dropout=(m.dropout,) * levels,
                        self_attention=(True,) * levels, switch=(False,) * (levels - 1))


@dataclass(frozen=True)
class StageBModel:
    encoder: str = ""
    """The semantic encoder, frozen: effnet_encoder.safetensors or one of ours. Empty: a new one learns with Stage B."""
    encoder_blocks: list[int] = field(default_factory=lambda: [1] * 6)
    """Blocks of each of the six stages of a new semantic encoder; the released one has those of EfficientNetV2-S."""
    hidden: list[int] = field(default_factory=lambda: [64, 128, 192, 192])
    """Without init_from, which says the rest itself: the width of each level, the first of 8 pixels a cell ..."""
    heads: list[int] = field(default_factory=lambda: [-1, -1, 3, 3])
    """... its attention heads, -1 in a level without attention ..."""
    depth: list[int] = field(default_factory=lambda: [1, 1, 2, 1])
    """... and how many rounds of ResBlock, timestep and attention it has on the way down, and as many on the way up."""
    context_dim: int = 192
    """Width of the text in the attentions."""


@dataclass(frozen=True)
class UltraPixelStageBSettings(Settings):
    name: ClassVar[str] = "ultrapixel_stage_b"
    module: ClassVar[str] = "ultrapixel.stage_b"
    Model: ClassVar[type] = StageBModel
    sections: ClassVar[tuple[str, ...]] = ("vae", "text.padded")
    unread: ClassVar[dict[str, str]] = {}
    teaches: ClassVar[bool] = False
    dropout: float = 0.05
    """How often a picture's caption is taken away ..."""
    blind: float = 0.05
    """... and, apart from that, its semantic latent, for classifier-free guidance."""
    semantic_noise: float = 0.1
    """Width of the noise on the semantic latent, so that Stage B bears what Stage C gets wrong."""
    kl: float = 1e-3
    """Where the semantic encoder learns: weight of half the mean square of its latent."""
    encoder_learning_rate_multiple: float = 1.0
    weight: str = "adaptive"
    """Weight of the loss, by its noise level: adaptive, p2 or none, as for ultrapixel_guide."""
    sample_hints: list[str] = field(default_factory=list)
    """Pictures that samples are drawn again from, through the semantic latent: one for each prompt, in turn."""

    def hint_names(self, config: Config) -> list[str]:
        return [""]

    def problems(self, config: Config) -> list[str]:
        problems, model, samples = Problems([
            *of_text(config), *of_weights(config), *of_loss(self.dropout, 0.0, self.weight)
        ]), config.model, config.samples
        problems.share("recipe.blind", self.blind)
        for name in ("semantic_noise", "kl", "encoder_learning_rate_multiple"):
            problems.at_least(f"recipe.{name}", look_up(self, name), 0)
        problems.exists("model.encoder", model.encoder, "file")
        blocks = model.encoder_blocks
        problems.need(len(blocks) == ENCODER_STAGES and min(blocks) >= 1,
                      f"model.encoder_blocks={blocks} must be {ENCODER_STAGES} numbers from 1 on.")
        problems.need(config.vae.path,
                      "vae.path is empty: Stage B draws latents of Stage A. Name stage_a.safetensors, or one of ours.")
        problems.need(not samples.classes, "samples.classes is for class-conditional runs: use samples.prompts.")
        tables = samples.tables
        own = len(tables) == len(samples.prompts) > 0 and all(one.hint for one in tables.values())
        problems.need(not samples.every or self.sample_hints or own,
                      f"samples.every={samples.every} draws pictures again, and recipe.sample_hints names none.")
        for path in self.sample_hints:
            problems.need(Path(path).expanduser().is_file(), f"recipe.sample_hints: there is no file {path!r}.")
        try:
            if not config.init_from:
                new_stage_b(config, 1)
        except ValueError as error:
            problems.append(f"[model]: {error}")
        return problems + sizes(config, STAGE_B_PIXELS)

    def bases(self, config: Config) -> list[str]:
        return [config.model.encoder, config.vae.path]


def new_stage_b(config: Config, pooled: int) -> StageBConfig:
    """Shape of a Stage B that starts from nothing. pooled: width of its texts' vectors. Raises ValueError."""
    m, levels = config.model, len(config.model.hidden)
    rounds = tuple(("CT" if heads < 1 else "CTA") * n for n, heads in zip(m.depth, m.heads, strict=False))
    return StageBConfig(hidden=tuple(m.hidden), heads=tuple(m.heads), down=rounds, up=rounds[::-1],
                        down_repeats=(1,) * levels, up_repeats=(1,) * levels, context_dim=m.context_dim,
                        pooled_dim=pooled, dropout=(0.0,) * levels, self_attention=(True,) * levels)


@dataclass(frozen=True)
class StageAModel:
    hidden: int = 96
    """Without init_from, which says all of this itself: the width at 4 pixels a cell; half as much at 2 pixels."""
    bottleneck_blocks: int = 4
    """Blocks of the decoder at 4 pixels a cell."""


@dataclass(frozen=True)
class UltraPixelStageASettings(AutoencoderSettings):
    name: ClassVar[str] = "ultrapixel_stage_a"
    module: ClassVar[str] = "ultrapixel.stage_a"
    Model: ClassVar[type] = StageAModel

    @property
    def factor(self) -> int:
        return StageAConfig().compression

    def of_model(self, model: StageAModel) -> list[str]:
        try:
            StageAConfig(hidden=model.hidden, bottleneck_blocks=model.bottleneck_blocks)
        except ValueError as error:
            return [f"[model]: {error}"]
        return []


RECIPES = {kind.name: kind for kind in (UltraPixelGuideSettings, UltraPixelLoraSettings, UltraPixelControlNetSettings,
                                        UltraPixelStageASettings, UltraPixelStageBSettings, UltraPixelStageCSettings)}


def of_family(config: Config) -> list[str]:
    """What every UltraPixel recipe needs."""
    problems, model, samples = Problems([*of_text(config), *of_weights(config)]), config.model, config.samples
    for name in (*FILES, "image_encoder"):
        problems.exists(f"model.{name}", look_up(model, name))
    if isinstance(model, StageCModel):
        problems.need(not model.stage_c, f"model.stage_c={model.stage_c!r} is not read, for it is what is trained: to "
                                         "go on from a Stage C name it in init_from.")
    else:
        problems.need(model.stage_c,
                      "model.stage_c is empty: name Stage C of Stable Cascade (stage_c_bf16.safetensors), the "
                      "base that UltraPixel builds on.")
    problems.need(config.vae.path,
                  "vae.path is empty: Stage C draws latents of Stable Cascade's semantic encoder. Name "
                  "effnet_encoder.safetensors.")
    problems.need(not samples.classes, "samples.classes is for class-conditional runs: use samples.prompts.")
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


def of_text(config: Config) -> list[str]:
    """Problems with the text encoder."""
    problems, text, teaches = Problems(), config.text, config.recipe.teaches
    problems.need(text.encoder, "text.encoder is empty: Stage C reads captions. Name the folder of CLIP-G's text tower "
                                "(text_encoder of stabilityai/stable-cascade, with its tokenizer), or for a small "
                                "Stage C a T5 that `export` wrote.")
    problems.need(not text.encoder or text.frozen or text.padded or text.encoder == "small" and not teaches,
                  f"text.encoder={text.encoder!r}: Stage C attends to all of text.max_length tokens of a T5, padding "
                  "included. Set text.padded=true.")
    problems.need(not (text.frozen and text.padded),
                  "text.padded=true is for a T5 of ours; CLIP-G's texts are padded in any case: take it out.")
    if not teaches:
        problems.need(text.encoder != "small",
                      "text.encoder='small': Stage C reads CLIP-G, a folder as transformers saves it, and a small one "
                      "the T5 that it was trained with, a .safetensors file.")
        problems.need(text.frozen or text.encoder in ("", "small") or not text.learn,
                      f"text.learn=true: recipe.name={config.recipe.name!r} takes the text encoder as it is: set "
                      "text.learn=false.")
    return problems


def of_weights(config: Config) -> list[str]:
    """A problem where two weights of the noise level are set."""
    weight = "loss.snr_gamma" if config.loss.snr_gamma else "loss.debiased"
    if not (config.loss.snr_gamma or config.loss.debiased) or config.recipe.weight == "none":
        return []
    return [f"recipe.weight={config.recipe.weight!r} and {weight} both weigh the loss by its noise level: set "
            "recipe.weight=\"none\", or leave the other out."]


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
