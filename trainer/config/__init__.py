"""Settings: dataclasses with the doc under the field, read from TOML and `key=value` words, strictly.

Everything wrong is found and reported together, before anything is allocated; past that edge nobody checks again.
"""
from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TRAINER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Data:
    kind: str = "auto"
    """auto: told by what lies there. jsonl: one object a line (file, caption or captions, tags, class, split, and a key
    for each condition). folder: pictures with a same-name .txt or .json, in folders of any depth. classes: one folder
    per class (ImageNet layout). data_info: PixArt's data_info.json (path, prompt, sharegpt4v, height, width). sam:
    images/, captions/, partition/. webdataset: .tar shards. datasets: a Hugging Face data set on disk, or parquet
    files."""
    path: str = ""
    """The file, or the folder. Pictures are turned as their EXIF says, and stand on white where transparent."""
    held_out_path: str = ""
    """The held-out pictures, in the same layout (a jsonl may name its split itself, a data set has a validation split).
    With classes, its folders have names that the training folder has too."""
    caption: str = ""
    """What pictures without a caption are called ("a photo of sks dog")."""
    prior_path: str = ""
    """Pictures of what the model must not forget (DreamBooth's class pictures), in any layout; brought to the size of
    the pictures that they stand beside."""
    prior_caption: str = ""
    """What prior pictures without a caption are called ("a photo of a dog")."""
    prior_share: float = 0.5
    """Share of prior pictures in every batch, evenly spread over it."""
    conditions: list[str] = field(default_factory=list)
    """Condition pictures to load with each picture, cut and mirrored like it: keys of the jsonl or data_info entries
    (PixelPonder's canny, depth, openpose, hed), columns, KEY.NAME.png in shards, or beside a folder DIR/images the
    folders DIR/NAME with pictures of the same names."""
    resolution: int = 256
    """Side of the square in pixels; with buckets, of the square that is as large as the other sizes."""
    resolutions: list[int] = field(default_factory=list)
    """Several at once: a picture goes to the one nearest to its own area. Empty: data.resolution alone."""
    buckets: str = ""
    """Empty: squares. pixart: the sizes that PixArt was trained on (256, 512, 1024, 2048, 2880). ultrapixel: its
    rule, multiples of 32. area: all multiples of bucket_multiple that have about the area. A picture goes to the
    nearest aspect ratio; none is left out."""
    bucket_multiple: int = 64
    """Of buckets = "area": sides are multiples of so many pixels ..."""
    bucket_ratio: float = 2.0
    """... and at most so many times as long as wide."""
    bucket_group: int = 0
    """So many pictures in a row of a batch have one size; 0 = the whole batch. Lower it to the pictures in a pass
    where a bucket has fewer pictures than a batch. A bucket's rest is filled up from its own next round."""
    crop: str = "random"
    """random: short side to 1.125 x resolution, random crop (the paper); with buckets, resized to cover and cropped
    anywhere along what is too long. centre: ADM's centre crop. none: the picture is square already, and is only
    resized when its size differs."""
    flip: bool = False
    """Mirror half of the pictures. The paper does; leave it off where captions say left and right, or where conditions
    do (openpose colours the left arm otherwise than the right)."""
    cache: bool = True
    """Keep decoded pictures in memory as uint8, where the crop is fixed (none or centre) and all fit into 2 GiB."""
    workers: int = 4
    """Threads that decode pictures."""
    described_share: float = 0.5
    """How often a caption that a model wrote (sharegpt4v) stands for the picture's own, where it has both."""
    tag_share: float = 0.0
    """How often a caption is followed by some of the item's tags."""
    tag_count: int = 2
    templates: list[str] = field(default_factory=list)
    """Frames such as "a picture of {}" that a caption is put into ..."""
    template_share: float = 0.0
    """... this often."""

    @property
    def sides(self) -> list[int]:
        """The resolutions."""
        return self.resolutions or [self.resolution]

    def problems(self, batch_size: int, micro: int) -> list[str]:
        found = []

        def need(good, sentence):
            if not good:
                found.append(sentence)

        kinds = {"auto": "either", "jsonl": "a file", "folder": "a folder", "classes": "a folder", "sam": "a folder",
                 "data_info": "a file", "webdataset": "either", "datasets": "either"}
        for name, value, choices in (("kind", self.kind, kinds), ("crop", self.crop, ("random", "centre", "none")),
                                     ("buckets", self.buckets, ("", "pixart", "ultrapixel", "area"))):
            need(value in choices, f"data.{name}={value!r} is none of {', '.join(c for c in choices if c)}"
                                   f"{nearest(value, choices)}.")
        for name in ("path", "held_out_path", "prior_path"):
            path = getattr(self, name)
            need(not path or Path(path).expanduser().exists(),
                 f"data.{name}={path!r}: there is no such file or folder.")
        need(self.path, "data.path is empty: name the pictures.")
        path = Path(self.path).expanduser()
        takes = kinds.get(self.kind, "either")
        if self.path and path.exists() and takes != "either":
            need(path.is_file() == (takes == "a file"), f"data.path={self.path!r} is a "
                 f"{'file' if path.is_file() else 'folder'}, and data.kind={self.kind!r} takes {takes}.")
        need(self.workers >= 1, f"data.workers={self.workers} must be at least 1.")
        need(min(self.sides) >= 1, f"data.resolution{'s' * bool(self.resolutions)}="
                                   f"{self.resolutions or self.resolution} must be at least 1.")
        if self.buckets == "pixart":
            from ...models_impl.pixart.buckets import TABLES

            need(set(self.sides) <= set(TABLES), f"data.buckets='pixart' has tables for {', '.join(map(str, TABLES))}, "
                                                 f"not for data.resolution={', '.join(map(str, self.sides))}.")
        if self.buckets == "area":
            need(1 <= self.bucket_multiple <= min(self.sides), f"data.bucket_multiple={self.bucket_multiple} is not in "
                                                               f"1 to {min(self.sides)}, the resolution.")
            need(self.bucket_ratio >= 1, f"data.bucket_ratio={self.bucket_ratio} must be at least 1.")
        need(not (self.buckets and self.crop == "none"),
             "data.crop='none' takes squares, and data.buckets are of other shapes: use centre or random.")
        group = self.bucket_group
        need(group >= 0, f"data.bucket_group={group} must not be negative.")
        need(group < 1 or batch_size % group == 0,
             f"batch_size={batch_size} is not a multiple of data.bucket_group={group}.")
        need(group < 1 or micro < 1 or group % micro == 0,
             f"data.bucket_group={group} is not a multiple of micro_batch_size={micro}, whose pictures have one size.")
        for name in ("tag_share", "template_share", "described_share"):
            value = getattr(self, name)
            need(0 <= value <= 1, f"data.{name}={value} is outside [0, 1].")
        if self.prior_path:
            group = group or batch_size
            need(0 < self.prior_share < 1, f"data.prior_share={self.prior_share} is outside (0, 1).")
            need(1 <= group * self.prior_share < group,
                 f"data.prior_share={self.prior_share} of {group} pictures of one size is no whole prior picture, or "
                 "leaves no other: use a larger batch_size.")
        need(all("{}" in t for t in self.templates), "data.templates: each one needs a {} where the caption goes.")
        return found


@dataclass(frozen=True)
class Text:
    encoder: str = ""
    """Empty: class-conditional. small: a new T5 of the sizes below. A .safetensors file: a T5 that `export` wrote. Else
    a folder or name that transformers reads (google/flan-t5-xl), frozen, its embeddings kept in `cache`."""
    learn: bool = True
    """Train the encoder together with the model, where it is small or a file of ours."""
    tokenizer: str = ""
    """A tokenizer.json; empty with encoder=small: a unigram model of `vocabulary` pieces is made from the captions."""
    vocabulary: int = 4000
    width: int = 256
    depth: int = 4
    heads: int = 4
    hidden: int = 1024
    """Width of the feed-forward layers."""
    max_length: int = 64
    """Tokens after which a caption is cut."""
    rate: float = 1.0
    """Learning rate of the text encoder, as a multiple of optimizer.rate."""
    cache: str = ""
    """Folder for the embeddings of a frozen encoder, which runs may share; empty: cache.folder, and without that one
    inside the run folder."""
    clean: bool = False
    """Clean captions before a frozen encoder reads them, as PixArt-alpha's were: lower case, no addresses or markup."""
    padded: bool = False
    """Read captions as FLUX does (recipes flux and pixelponder): filled up to max_length, the filling attended to as if
    it were words."""
    clip: str = ""
    """Folder of CLIP-L (openai/clip-vit-large-patch14, or FLUX's text_encoder), whose vector FLUX reads beside the
    tokens of a frozen T5. Empty: zeros in its place."""
    precision: str = "fp32"
    """Of a frozen encoder: fp32, or bf16, which takes half the memory (T5-XXL: 9.5 GB)."""

    @property
    def frozen(self) -> bool:
        """Whether transformers reads the encoder."""
        return self.encoder not in ("", "small") and not self.encoder.endswith(".safetensors")


@dataclass(frozen=True)
class Vae:
    path: str = ""
    """What makes latents of pictures, frozen: a folder of diffusers (an AutoencoderKL or AutoencoderTiny, or a pipeline
    that has one in vae/), or one .safetensors file, the recipe autoencoder's too."""
    precision: str = "fp32"
    """fp32 or bf16. The SDXL VAE is not right in fp16."""


@dataclass(frozen=True)
class Cache:
    folder: str = ""
    """Where features of frozen encoders are kept, which runs may share; `python -m trainer cache` fills it. Empty: only
    the embeddings of captions are kept, and pictures are encoded whenever they are shown."""


@dataclass(frozen=True)
class Adapter:
    kind: str = "lora"
    """lora; loha: the product, place by place, of two of them (arXiv 2108.06098); lokr: a Kronecker product (LyCORIS,
    arXiv 2309.14859), small files of high rank."""
    factor: int = -1
    """Of lokr: the side of the small one of its two matrices, or what comes nearest to it; -1 = about the root of the
    layer's."""
    rank: int = 16
    alpha: float = 0.0
    """The change counts alpha / rank times; 0 = the rank, so once. peft's own scripts for PixArt mean 8 by silence."""
    targets: list[str] = field(default_factory=list)
    """How the names of the layers end that get an adapter; empty: what the recipe says, the layers of all blocks."""
    rslora: bool = False
    """alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Direction and length apart (arXiv 2402.09353): a third slower, and often closer to training all weights."""
    gaussian: bool = True
    """Start as the release's scripts do: normal with a deviation of 1 / rank. false: peft's default, kaiming."""


@dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"
    """adamw; adamw8bit: with its moments in 8 bits, by bitsandbytes; muon: Muon for the hidden matrices, AdamW for
    everything else; came: CAME (PixArt-Sigma), which keeps of a matrix's second moment only a row and a column."""
    rate: float = 1e-4
    scale_rate: str = "none"
    """The rate is for a batch of 256, and for another one it is scaled: sqrt (PixArt's rule) or linear. none."""
    betas: list[float] | None = None
    """Without it [0.9, 0.999], for came [0.9, 0.999, 0.9999]."""
    eps: float = 0.0
    """What keeps AdamW's denominator from zero; 0 = 1e-8."""
    weight_decay: float = 0.0
    muon_rate: float = 0.01
    """Learning rate of the matrices that Muon trains."""
    muon_momentum: float = 0.95
    warm_up: int = 0
    """Steps over which the rate rises from zero."""
    decay: str = "constant"
    """constant, cosine or linear: down to zero ..."""
    decay_from: float = 0.0
    """... starting at this share of the steps (0.8 = the last fifth)."""
    clip: float = 1.0
    """Largest gradient norm; 0 = no limit."""


@dataclass(frozen=True)
class Ema:
    decay: float = 0.9999
    """0 = no moving average."""
    warm_up: bool = False
    """Use (1 + step) / (10 + step) while that is lower: the average forgets the random start sooner."""


@dataclass(frozen=True)
class Memory:
    base: str = ""
    """How the blocks of a network that stays as it is are kept, under an adapter or a ControlNet: empty, in the run's
    precision; fp8, a byte a weight; nf4, half a byte, by bitsandbytes. They are made whole as they are used."""
    swap_blocks: int = 0
    """So many of those blocks are kept in host memory and copied to the device around their forward and backward
    passes, one ahead; needs checkpoint_activations."""
    shard: bool = False
    """Of several processes, each keeps only its part of the blocks' weights, gradients and moments (FSDP2). The same as
    `accelerate launch --use_fsdp --fsdp_version 2`."""


@dataclass(frozen=True)
class Log:
    wandb: str = ""
    """Tell Weights & Biases too what tensorboard is told: online, or offline, into RUN/wandb, which `wandb sync` sends
    later. A run that goes on goes on there. Empty: do not."""
    project: str = "pixstack"
    """Of Weights & Biases; the run has the name of this one."""


@dataclass(frozen=True)
class Samples:
    every: int = 0
    """Steps between sample grids; 0 = none."""
    prompts: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    steps: int = 10
    """Per stage."""
    shift: float = 1.0
    cfg: float = 4.0
    seed: int = 0
    height: int = 0
    """0 = data.resolution"""
    width: int = 0


@dataclass(frozen=True)
class Validation:
    every: int = 0
    """Steps between measurements of the loss on the held-out pictures, with fixed noise; 0 = none."""
    items: int = 256
    """At most so many pictures."""


@dataclass(frozen=True)
class Config:
    name: str = "run"
    recipe: Any = None
    """[recipe] name = "...": what the loss is; its other settings belong to the recipe."""
    model: Any = None
    """[model]: settings of the network, defined by the recipe."""
    data: Data = Data()
    text: Text = Text()
    vae: Vae = Vae()
    cache: Cache = Cache()
    adapter: Adapter = Adapter()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    memory: Memory = Memory()
    log: Log = Log()
    samples: Samples = Samples()
    validation: Validation = Validation()

    out: str = "runs/{name}"
    """The run folder. If it holds a checkpoint, the run goes on from there."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint if the settings that shape the result are the same. changed: go on with
    other settings. never: refuse a folder that holds a run."""
    init_from: str = ""
    """A checkpoint (released or ours) whose weights the network starts from."""
    seed: int = 0
    steps: int = 100_000
    batch_size: int = 64
    """Samples per optimizer step, over all processes and accumulation rounds."""
    micro_batch_size: int = 0
    """Samples per forward pass and process, in validation too; lower it when memory runs out, the result is the same.
    0 = as large as batch_size allows (in validation 64)."""
    precision: str = "bf16"
    """bf16: float32 weights under autocast. fp32."""
    device: str = "auto"
    """auto: the GPUs that accelerate or torchrun gives (CUDA_VISIBLE_DEVICES narrows them), else the CPU. cpu."""
    threads: int = 0
    """CPU threads of torch; 0 = torch's choice."""
    compile: bool = False
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, a third more work."""
    save_every: int = 1000
    keep: int = 3
    """Newest checkpoints kept; 0 = all."""
    log_every: int = 10

    @property
    def folder(self) -> Path:
        return Path(self.out.format(name=self.name))

    def problems(self) -> list[str]:
        found = []

        def need(good, sentence):
            if not good:
                found.append(sentence)

        def one_of(name, value, *choices):
            need(value in choices, f"{name}={value!r} is none of {', '.join(filter(None, choices))}"
                                   f"{nearest(value, choices)}.")

        one_of("optimizer.name", self.optimizer.name, "adamw", "adamw8bit", "muon", "came")
        need(self.optimizer.name != "adamw8bit" or find_spec("bitsandbytes"),
             "optimizer.name='adamw8bit' needs bitsandbytes: pip install bitsandbytes, or use adamw or came.")
        one_of("log.wandb", self.log.wandb, "", "offline", "online")
        need(not self.log.wandb or find_spec("wandb"), f"log.wandb={self.log.wandb!r} needs wandb: pip install wandb.")
        one_of("optimizer.scale_rate", self.optimizer.scale_rate, "none", "sqrt", "linear")
        one_of("text.precision", self.text.precision, "fp32", "bf16")
        one_of("vae.precision", self.vae.precision, "fp32", "bf16")
        if self.optimizer.name == "muon":
            import torch

            need(hasattr(torch.optim, "Muon"), f"optimizer.name='muon' needs torch 2.9 or newer, this is "
                                               f"{torch.__version__}: use adamw.")
        one_of("optimizer.decay", self.optimizer.decay, "constant", "cosine", "linear")
        one_of("precision", self.precision, "bf16", "fp32")
        one_of("device", self.device, "auto", "cpu")
        one_of("resume", self.resume, "auto", "changed", "never")
        found += self.data.problems(self.batch_size, self.micro_batch_size)
        for name, path in (("init_from", self.init_from), ("text.tokenizer", self.text.tokenizer),
                           ("text.clip", self.text.clip), ("vae.path", self.vae.path)):
            need(not path or Path(path).expanduser().exists(), f"{name}={path!r}: there is no such file or folder.")
        if self.text.encoder.endswith(".safetensors"):
            need(Path(self.text.encoder).expanduser().is_file(),
                 f"text.encoder={self.text.encoder!r}: there is no such file or folder.")
        for name in ("steps", "batch_size", "save_every", "log_every", "samples.steps", "text.max_length",
                     "text.vocabulary", "text.width", "text.depth", "text.heads"):
            value = look_up(self, name)
            need(value >= 1, f"{name}={value} must be at least 1.")
        for name in ("micro_batch_size", "threads", "keep", "samples.every", "validation.every", "optimizer.warm_up",
                     "optimizer.weight_decay", "optimizer.clip", "optimizer.eps"):
            value = look_up(self, name)
            need(value >= 0, f"{name}={value} must not be negative.")
        need(not self.samples.every or self.samples.prompts or self.samples.classes,
             f"samples.every={self.samples.every} draws pictures, and neither samples.prompts nor samples.classes says "
             "of what.")
        share = self.optimizer.decay_from
        need(0 <= share <= 1, f"optimizer.decay_from={share} is outside [0, 1].")
        for name in ("optimizer.rate", "optimizer.muon_rate"):
            value = look_up(self, name)
            need(0 < value < 1, f"{name}={value} is outside (0, 1).")
        need(0 <= self.ema.decay < 1, f"ema.decay={self.ema.decay} is outside [0, 1).")
        betas, count = self.optimizer.betas, 3 if self.optimizer.name == "came" else 2
        need(betas is None or (len(betas) == count and all(0 <= b < 1 for b in betas)),
             f"optimizer.betas={betas} must be {('two', 'three')[count - 2]} numbers in [0, 1).")
        micro = self.micro_batch_size
        need(micro < 1 or self.batch_size % micro == 0,
             f"batch_size={self.batch_size} is not a multiple of micro_batch_size={micro}.")
        made = [f"data.{n}={v}" for n in ("tag_share", "template_share") if (v := getattr(self.data, n)) > 0]
        need(not (self.text.frozen and made),
             f"{', '.join(made)} makes other captions at every step, and the embeddings of a frozen encoder are made "
             "once, before training: set it to 0 and write such captions into the data, or let an encoder learn.")
        need(not self.text.clip or self.text.frozen, "text.clip goes with a frozen T5: name its folder, text.encoder.")
        need(self.text.width % max(self.text.heads, 1) == 0 or self.text.encoder != "small",
             f"text.width={self.text.width} is not a multiple of text.heads={self.text.heads}.")
        return found


def load(path: Path, words: list[str] = ()) -> Config:
    """The settings of a TOML file, changed by words such as `optimizer.rate=3e-4`."""
    return parse(read_toml(path), words, str(path))


def read_toml(path) -> dict:
    found = next((p for p in (Path(path), TRAINER / path, TRAINER / "recipes" / path) if p.is_file()), None)
    if found is None:
        shipped = {p.name: p.relative_to(TRAINER).as_posix() for p in sorted(TRAINER.glob("recipes/*/*.toml"))}
        if moved := shipped.get(Path(path).name):
            raise ValueError(f"{path}: there is no such recipe file. It is trainer/{moved} now.")
        raise ValueError(f"{path}: there is no such recipe file. Shipped with the trainer: "
                         f"{', '.join(shipped.values())}.")
    try:
        return tomllib.loads(found.read_text(encoding="utf-8-sig"))  # Windows' editors put a mark first
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{found} is not valid TOML: {error}") from None


def parse(raw: dict, words=(), origin="the settings", check: bool = True) -> Config:
    """check: also look at values and files, not only at names and types (a finished run's data may be gone)."""
    from ..recipes import RECIPES, find

    problems = []
    raw = {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            problems.append(f"{word!r} is not of the form key=value.")
            continue
        section, key = raw, name.strip()
        if "." in key:
            section_name, key = key.split(".", 1)
            section = raw.setdefault(section_name, {})
        section[key] = value_of(text)

    recipe = raw.get("recipe", {})
    name = recipe.pop("name", None) if isinstance(recipe, dict) else None
    if name not in RECIPES:
        problems.append(f"[recipe] name = {name!r} is none of {', '.join(RECIPES)}{nearest(name, RECIPES)}.")
        kinds = {}
    else:
        kinds = {"recipe": find(name).Settings, "model": find(name).Model}
    config = build(Config, raw, kinds, problems)
    if config and kinds:
        config = dataclasses.replace(config, **{k: getattr(config, k) or kind() for k, kind in kinds.items()})
    if config and check:  # what did not fit stands at its default here, so that everything else is still looked at
        problems += config.problems()
        if kinds:
            for section, plain in (("vae", Vae()), ("adapter", Adapter())):  # that not every recipe reads
                if section not in find(name).sections and getattr(config, section) != plain:
                    problems.append(f"[{section}] is not read by recipe.name={name!r}: take it out.")
            if config.text.padded and "text.padded" not in find(name).sections:
                problems.append(f"text.padded=true is for networks that read captions as FLUX does, and recipe.name="
                                f"{name!r} masks what fills them up: take it out.")
            from ..distributed import strategy
            from ..memory import offload, quantization

            problems += quantization.problems(config, find(name).sections)
            problems += offload.problems(config, find(name).sections)
            problems += strategy.problems(config)
        if kinds and not any(p.startswith("model.") for p in problems):
            problems += find(name).problems(config)
    if problems:
        raise ValueError(f"{origin} cannot work:\n  " + "\n  ".join(problems))
    return config


def value_of(text: str):
    """A word's value as TOML reads it; what TOML cannot read is a plain string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def build(cls, raw: dict, kinds: dict, problems: list[str], prefix=""):
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    good = {}
    for key, value in raw.items():
        full = prefix + key
        if key not in names:
            problems.append(f"{full} is not a setting{nearest(key, names)}.")
            continue
        kind = kinds.get(key, hints[key])
        if dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                good[key] = build(kind, value, {}, problems, f"{full}.")
            else:
                problems.append(f"{full} is a section, [{full}], not a value ({value!r}).")
        elif kind is Any:
            pass  # a section of an unknown recipe, already reported
        else:
            value, fits = convert(value, kind)
            if fits:
                good[key] = value
            else:
                problems.append(f"{full}={value!r} should be {in_words(kind)}.")
    try:
        return cls(**good)
    except (TypeError, ValueError) as error:
        problems.append(f"{prefix or 'settings: '}{error}")
        return None


def convert(value, kind):
    """(value as `kind`, whether it fits). An int serves as a float, and nothing else is bent."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        for one in args:
            converted, fits = convert(value, one)
            if fits:
                return converted, True
        return value, False
    if origin is list:
        if not isinstance(value, list):
            return value, False
        pairs = [convert(v, args[0]) for v in value]
        return [v for v, _ in pairs], all(fits for _, fits in pairs)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), True
    return value, isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def in_words(kind) -> str:
    if typing.get_origin(kind) is list:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    if typing.get_args(kind):
        return " or ".join(in_words(k) for k in typing.get_args(kind) if k is not type(None))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(kind, str(kind))


def nearest(name, choices) -> str:
    close = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}" if close else ""


def look_up(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def differences(old: Config, new: Config, free: set[str]) -> list[str]:
    """Settings with other values, in words, without those that are `free` to change."""
    found = []

    def compare(a: dict, b: dict, prefix: str):
        for key in a.keys() | b.keys():
            name = prefix + key
            if isinstance(a.get(key), dict) and isinstance(b.get(key), dict) and name not in free:
                compare(a[key], b[key], name + ".")
            elif a.get(key) != b.get(key) and name not in free:
                found.append(f"{name} was {a.get(key)!r}, now {b.get(key)!r}")

    compare(as_dict(old), as_dict(new), "")
    return sorted(found)


def as_dict(config: Config) -> dict:
    raw = dataclasses.asdict(config)
    raw["recipe"] = {"name": config.recipe.name, **raw["recipe"]}
    return raw
