"""Settings: dataclasses with the doc under the field. What they may be is in rules.py, how they are read in load.py.

Not pydantic: what load.py and problems.py do by themselves would remain, and that is all of it. An unknown key with the
nearest name, a setting's former name, a sentence that says what to do, and every problem at once, those between
settings included, where pydantic stops at those of single fields. The trainer would need one more package for types.
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

LARGEST_SIDE = 16384  # of a picture in pixels


class Table:
    """One of an array of tables, [[section.name]]."""

    INHERITED: ClassVar[tuple[str, ...]] = ()
    """What it has from the section around it where it does not say it itself."""


@dataclass(frozen=True)
class SetSettings:
    """How the pictures of one data set are found, cut and captioned."""

    kind: str = "auto"
    """auto: recognised by what lies there. jsonl: one object a line (file, caption or captions, tags, class, split, and
    a key for each condition). csv, table: a Hugging Face folder's metadata.csv or .parquet (file_name, text). folder:
    pictures with a same-name .txt, .caption or .json, in folders of any depth. classes: one folder per class (ImageNet
    layout). splits: a folder with train/ and validation/ or test/, each in any layout. data_info: PixArt's
    data_info.json (path, prompt, sharegpt4v, height, width), or kohya's metadata. sam: images/, captions/, partition/.
    webdataset: .tar shards. datasets: a Hugging Face data set on disk, or parquet files."""
    path: str = ""
    """The file, or the folder; linked folders are followed. Pictures are turned as their EXIF says, and stand on white
    where transparent. Of gray with more than 8 bits, white is 65535 in whole numbers (255 in 32 bits where no value is
    above it) and 1 in floats."""
    held_out_path: str = ""
    """The held-out pictures, in the same layout (a jsonl may name its split itself, a data set has a validation split).
    With classes, its folders have names that the training folder has too."""
    caption: str = ""
    """What pictures without a caption are called ("a photo of sks dog")."""
    name_captions: bool = False
    """Pictures without a caption are called what their file is, without the numbers at its ends: sks_dog_01.png is
    "sks dog". A name of numbers only says nothing; then `caption` counts."""
    crop: str = "random"
    """random: short side to 1.125 x resolution, random crop (the paper); with buckets, resized to cover and cropped
    anywhere along what is too long. centre: ADM's centre crop. none: the picture is square already, and is only
    resized when its size differs."""
    flip: bool = False
    """Mirror half of the pictures. The paper does; leave it off where captions say left and right, or where conditions
    do (openpose colours the left arm otherwise than the right)."""
    brightness: float = 0.0
    """Change the brightness at random, by a factor of at most so much more or less (0.1: 0.9 to 1.1); and so ..."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """... and turn the colours by at most this part of their circle, up to 0.5 ..."""
    colour_share: float = 1.0
    """... in so many of the pictures."""
    rotation: float = 0.0
    """Turn pictures by up to so many degrees to either side, with their conditions; the largest rectangle of the same
    shape that has no empty corners is kept ..."""
    rotation_share: float = 1.0
    """... in so many of them."""
    described_share: float = 0.5
    """How often a caption that a model wrote (sharegpt4v) stands for the picture's own, where it has both."""
    tag_share: float = 0.0
    """How often a caption is followed by some of the item's tags."""
    tag_count: int = 2
    templates: list[str] = field(default_factory=list)
    """Frames such as "a picture of {}" that a caption is put into ..."""
    template_share: float = 0.0
    """... this often."""
    wildcards: bool = False
    """Draw one alternative each time of "a {red|blue} car" in a caption or template. In validation it is the first."""
    shuffle_tags: bool = False
    """A caption is a list with commas, whose parts come in another order each time ..."""
    keep_tags: int = 0
    """... but for so many at its beginning, which are never left out either."""
    tag_dropout: float = 0.0
    """How often each part of such a list is left out. (How often a whole caption is: recipe.dropout.)"""


    @property
    def rewords(self) -> dict[str, Any]:
        """The settings that make other captions at every step."""
        names = ("tag_share", "template_share", "shuffle_tags", "tag_dropout", "wildcards")
        return {name: value for name in names if (value := look_up(self, name))}

    @property
    def colours(self) -> dict[str, float]:
        """What changes of the colours, and by how much at most."""
        names = ("brightness", "contrast", "saturation", "hue")
        return {name: value for name in names if (value := look_up(self, name))}

    @property
    def varies(self) -> dict[str, float]:
        """The settings that make another picture every time, beside crop and flip."""
        return {**self.colours, **({"rotation": self.rotation} if self.rotation else {})}


@dataclass(frozen=True)
class DataSet(SetSettings, Table):
    INHERITED: ClassVar[tuple[str, ...]] = tuple(f.name for f in fields(SetSettings)
                                                 if f.name not in ("path", "held_out_path"))

    name: str = ""
    """What the log calls it; empty: its number, from 1."""
    repeats: int = 1
    """How often an epoch shows each of its pictures."""
    weight: float = 0.0
    """Its share of the pictures that are shown, relative to the weights of the others, whatever the number of its
    pictures; each of them is shown equally often. 0 in all sets: shares follow from pictures and repeats."""
    loss_weight: float = 1.0
    """What the loss of its pictures counts."""
    prior: bool = False
    """It holds pictures of what the model must not forget (DreamBooth's class pictures, kohya's regularisation): they
    are data.prior_share of every batch, and brought to the size of the pictures that they stand beside."""
    prior_count: int = 0
    """With prior, as data.prior_count."""


@dataclass(frozen=True)
class Data(SetSettings):
    sets: list[DataSet] = field(default_factory=list)
    """Several data sets, [[data.sets]] each, in place of data.path. A set takes from [data] what it does not say itself
    of kind, caption, crop, flip, colours, rotation and captions; on the command line data.sets.2.repeats=3 is a setting
    of the second."""
    prior_path: str = ""
    """Pictures of what the model must not forget (DreamBooth's class pictures), in any layout; brought to the size of
    the pictures that they stand beside."""
    prior_caption: str = ""
    """What prior pictures without a caption are called ("a photo of a dog")."""
    prior_share: float = 0.5
    """Share of prior pictures in every batch, evenly spread over it."""
    prior_count: int = 0
    """Where prior_path holds fewer pictures than this, the others are drawn from prior_caption with the network as it
    is before the first step, by samples.steps, shift and cfg, and stay there. 0 = none."""
    balance_classes: bool = False
    """Show each class equally often, however many pictures it has; where sets have weights, within each set."""
    caption_variants: int = 0
    """With a frozen text encoder: where captions change at random, so many wordings of each picture's are drawn by the
    seed and embedded before the first step, and every step takes one of them. 0 = any number, for an encoder that
    learns."""
    conditions: list[str] = field(default_factory=list)
    """Condition pictures to load with each picture, cut and mirrored like it: keys of the jsonl or data_info entries
    (PixelPonder's canny, depth, openpose, hed), columns, KEY.NAME.png in shards, or beside a folder DIR/images the
    folders DIR/NAME with pictures of the same names."""
    resolution: int = 256
    """Side of the square in pixels; with buckets, of the square that is as large as the other sizes."""
    resolutions: list[int] = field(default_factory=list)
    """Several at once: a picture goes to the one nearest to its own area. Empty: only data.resolution."""
    buckets: str = ""
    """Empty: squares. pixart: the sizes that PixArt was trained on (256, 512, 1024, 2048, 2880). ultrapixel: its
    rule, multiples of 32. area: all multiples of bucket_multiple that have about the area. A picture goes to the
    nearest aspect ratio; none is left out."""
    bucket_multiple: int = 64
    """With buckets = "area", sides are multiples of so many pixels ..."""
    bucket_ratio: float = 2.0
    """... and at most so many times as long as wide."""
    bucket_group: int = 0
    """So many pictures in a row of a batch have one size; 0 = the whole batch. Lower it to the pictures in a pass where
    a bucket has fewer pictures than a batch. The rest of a bucket is padded with pictures of its own next round."""
    cache: bool = True
    """Keep decoded pictures in memory as uint8, where the crop is fixed (none or centre) and all fit into 2 GiB."""
    index: str = ""
    """Folder where the listing of jsonl, csv, parquet and data_info files and of shards is kept, and what pictures
    measure where buckets need it: a run begins at once, and the processes of a machine share one copy. It is made anew
    when a file has changed. Empty: everything is listed at each start, by each process."""
    shards_at_once: int = 0
    """Shards come in random order, and the pictures of so many at a time are mixed: files are read nearly from end to
    end, as disks and networks like it. Of what is no shard, a thousand pictures in the order of their list are one.
    0 = any picture may follow any other."""
    streams: int = 1
    """With shards_at_once, in so many places of the data at once, each for its stretch of every batch: as many as there
    are processes, and each reads shards of its own. It is no matter of processes: a run may go on with other numbers of
    them."""
    workers: int = 4
    """Threads that decode pictures."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read, named and counted, and train on the next ones of their size; else a run
    ends at the first of them, its step saved."""
    masks: str = ""
    """Where the loss counts (see [loss]): white in a mask, black not. alpha: the pictures' own transparency. files:
    beside a.png an a-masklabel.png (OneTrainer), beside a folder DIR/images the folder DIR/masks with pictures of the
    same names (kohya), or the key, column or KEY.mask.png "mask". A picture without one counts as a whole."""

    @property
    def beside(self) -> list[str]:
        """What a data set is asked for beside each picture: the conditions, and "mask" where masks are files."""
        return [*self.conditions, *(["mask"] if self.masks == "files" else [])]

    @property
    def sides(self) -> list[int]:
        """The resolutions."""
        return self.resolutions or [self.resolution]

    @cached_property
    def each(self) -> list[DataSet]:
        """The data sets: `sets`, or this section as the only one; then that of prior_path."""
        own = {f.name: look_up(self, f.name) for f in fields(SetSettings)}
        sets = self.sets or [DataSet(**own)]
        if not self.prior_path:
            return sets
        prior = {**own, "kind": "auto", "path": self.prior_path, "held_out_path": "", "caption": self.prior_caption,
                 "name_captions": False}
        return [*sets, DataSet(**prior, prior=True, prior_count=self.prior_count)]

    @property
    def has_prior(self) -> bool:
        return any(one.prior for one in self.each)

    def without_drawn(self) -> Data:
        """The same without the sets whose pictures a run may draw itself, whatever lies there."""
        return replace(self, prior_path="" if self.prior_count else self.prior_path, prior_count=0,
                       sets=[one for one in self.sets if not one.prior_count])

    def called(self, number: int) -> str:
        """What a set's settings begin with: "data" or "data.sets.2"."""
        return f"data.sets.{number + 1}" if number < len(self.sets) else "data"

    def unvaried(self) -> Data:
        """The same without anything random in a picture, for validation."""
        def still(one: SetSettings):
            return replace(one, flip=False, crop="centre" if one.crop == "random" else one.crop, rotation=0.0,
                           brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)

        return replace(still(self), sets=[still(one) for one in self.sets])


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
    learning_rate_multiple: float = 1.0
    """Learning rate of the text encoder, as a multiple of optimizer.learning_rate."""
    cache: str = ""
    """Folder for the embeddings of a frozen encoder, which runs may share; empty: cache.folder, and without that one
    inside the run folder."""
    clean: bool = False
    """Clean captions before a frozen encoder reads them, as PixArt-alpha's were: lower case, no addresses or markup."""
    padded: bool = False
    """Read captions as FLUX does (recipes flux and pixelponder, and those of a small Stable Cascade): padded to
    max_length, the padding attended to as if it were words."""
    ahead: bool = True
    """Embed all captions with a frozen encoder before the first step. false: each when it is first shown, and the
    encoder stays in memory: a run on millions of captions begins at once. A run that goes on may then differ by the
    rounding of embeddings, which depends on the captions that are embedded together."""
    clip: str = ""
    """Folder of CLIP-L (openai/clip-vit-large-patch14, or FLUX's text_encoder), whose vector FLUX reads beside the
    tokens of a frozen T5. Empty: zeros in its place."""
    precision: str = "fp32"
    """Precision of a frozen encoder: fp32; bf16, which takes half the memory (T5-XXL: 9.5 GB); or bf16 with the weights
    of its blocks kept in fewer bits, fp8 or int8 (4.9 GB), or nf4 (2.9 GB, by bitsandbytes), which rounds what it
    says. It is read in bf16 first, into host memory."""

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
class AdapterLayers(Table):
    pattern: str = ""
    """A regular expression, found in the names of the layers that it is about, such as "blocks\\\\.3\\\\.attn". The
    first table of which that is so counts for a layer, whether adapter.targets names the layer or not."""
    rank: int | None = None
    """Without it adapter.rank; 0 = these layers get no adapter. A last table of pattern = "." and rank = 0 leaves only
    the layers of the tables before it."""
    alpha: float | None = None
    """Without it adapter.alpha; where that is 0, the rank."""
    dropout: float | None = None
    """Without it adapter.dropout."""


@dataclass(frozen=True)
class Adapter:
    kind: str = "lora"
    """lora; loha: the product, place by place, of two of them (arXiv 2108.06098); lokr: a Kronecker product (LyCORIS,
    arXiv 2309.14859), small files of high rank; oft: the outputs of a layer turned in blocks of `rank` (arXiv
    2306.07280), LyCORIS' diag-oft, which keeps the lengths and angles of what the network knows."""
    factor: int = -1
    """With lokr, the side of the small one of its two matrices, or what comes nearest to it; -1 = about the root of the
    layer's."""
    rank: int | None = None
    """Without it 16, or the rank that a layer has in `start`. With oft the side of its blocks, or the next smaller one
    that divides the outputs of a layer."""
    alpha: float = 0.0
    """The change counts alpha / rank times; 0 = the rank, so once, or as in `start`. peft's own scripts for PixArt mean
    8 by silence."""
    targets: list[str] = field(default_factory=list)
    """How the names of the layers end that get an adapter; empty: those of `start`, or what the recipe says, the layers
    of all blocks."""
    layers: list[AdapterLayers] = field(default_factory=list)
    """Tables [[adapter.layers]]: layers whose adapters are of another rank, alpha or dropout."""
    dropout: float = 0.0
    """Share of a layer's inputs that its adapter does not see in a step, of lora. They are the same for all pictures of
    the step and all their tokens, so that neither passes nor processes change what is learned."""
    start: str = ""
    """An adapter file to start from, of any program: its layers, ranks and scales, where nothing else is said. Its
    kind must be adapter.kind (and adapter.dora)."""
    rslora: bool = False
    """alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Direction and length apart (arXiv 2402.09353): a third slower, and often closer to training all weights."""
    gaussian: bool = True
    """Start as the release's scripts do: normal with a deviation of 1 / rank. false: peft's default, kaiming."""


@dataclass(frozen=True)
class OptimizerGroup(Table):
    pattern: str = ""
    """A regular expression, found in the names of the parameters that it is about, as checkpoints have them:
    "net\\\\.blocks\\\\.3\\\\.", "^text", "bias$", or "lora_B" of an adapter. The first table of which that is so counts
    for a parameter; what no table is about learns as [optimizer] says."""
    learning_rate: float | None = None
    """In place of optimizer.learning_rate and of every multiple of it (text.learning_rate_multiple), or ..."""
    learning_rate_multiple: float = 1.0
    """... how many times the learning rate that they would have."""
    weight_decay: float | None = None
    """Without it optimizer.weight_decay."""


@dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"
    """adamw; adamw8bit: with its moments in 8 bits, by bitsandbytes; muon: Muon for the hidden matrices, AdamW for
    everything else; came: CAME (PixArt-Sigma), which keeps of a matrix's second moment only a row and a column;
    adafactor: that without a first moment, the least memory; lion: only a first moment, at a third to a tenth of
    AdamW's learning rate; stable_adamw: AdamW whose updates are clipped, so that gradients need not be (clip=0);
    prodigy: estimates its learning rate, learning_rate=1; schedule_free_adamw: averages the weights itself, without
    decay and EMA. Or any class of torch.optim or pytorch_optimizer by its name."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Other arguments of that class, a table: [optimizer.arguments], or optimizer.arguments.d_coef=0.5 in a word."""
    learning_rate: float = 1e-4
    """With prodigy, a factor of the learning rate that it estimates."""
    learning_rate_scaling: str = "none"
    """sqrt (PixArt's rule) or linear: the learning rate is for a batch of 256, and scaled for another one. none."""
    betas: list[float] | None = None
    """Without it the optimizer's own: [0.9, 0.999] for adamw, [0.9, 0.999, 0.9999] for came."""
    eps: float = 0.0
    """What keeps the denominator from zero; 0 = the optimizer's own, 1e-8 for adamw."""
    weight_decay: float = 0.0
    groups: list[OptimizerGroup] = field(default_factory=list)
    """Tables [[optimizer.groups]]: parameters of another learning rate or weight decay."""
    muon_learning_rate: float = 0.01
    """Learning rate of the matrices that Muon trains."""
    muon_momentum: float = 0.95
    warm_up: int = 0
    """Steps over which the learning rate rises from zero."""
    decay: str = "constant"
    """constant; or down, in a shape: linear, cosine, cosine_restarts (SGDR, arXiv 1608.03983), or rex (arXiv
    2107.04197), which stays high for longer than linear, and then falls ..."""
    decay_from: float = 0.0
    """... starting at this share of the steps (0.8 = the last fifth) ..."""
    decay_to: float = 0.0
    """... and ending at this share of the learning rate."""
    decay_cycles: int = 4
    """With cosine_restarts, how many times it falls; each fall takes as many steps."""
    clip: float = 1.0
    """Largest gradient norm; 0 = no limit."""


@dataclass(frozen=True)
class Ema:
    decay: float = 0.9999
    """0 = no exponential moving average of the weights."""
    warm_up: bool = True
    """Use (1 + step) / (10 + step) while that is lower: the EMA forgets the random start sooner. PixelFlow's and
    PixArt's own code do without; then samples of the first thousands of steps are noise."""


@dataclass(frozen=True)
class Memory:
    base: str = ""
    """How the blocks of a network that stays as it is are kept, under an adapter or a ControlNet: empty, in the run's
    precision; fp8 or int8, a byte a weight; nf4, half a byte, by bitsandbytes. They are dequantised as they are used.
    int8 also works where a device has no float8, as Apple's."""
    swap_blocks: int = 0
    """So many of those blocks are kept in host memory and copied to the device around their forward and backward
    passes, one ahead; needs checkpoint_activations."""
    weights: str = ""
    """How the matrices and kernels that learn are kept, where a network learns and no adapter: empty, in float32; bf16:
    they and their gradients take half, updates are made in float32 and rounded at random (stochastic rounding, arXiv
    2010.06192), and the EMA stays in float32."""
    fused_backward: bool = False
    """Each parameter learns during the backward pass as soon as its gradient is there, which is then forgotten:
    gradients take next to no memory. One pass of one process a step, without optimizer.clip."""
    shard: bool = False
    """Each of several processes keeps only its part of the blocks' weights, gradients and moments (FSDP2). The same as
    `accelerate launch --use_fsdp --fsdp_version 2`."""
    gather: str = "fp32"
    """In what a block is gathered that FSDP2 has spread, for its forward and backward passes. fp32: what is learned is
    what one process learns. bf16, with precision=bf16: half the traffic and half the memory of a block at work; gates,
    norms and embeddings inside blocks are rounded too, which autocast leaves. Gradients are added up in float32, and
    weights and moments stay float32."""


@dataclass(frozen=True)
class Noise:
    timesteps: str = "released"
    """How the noise levels of the pictures are drawn. Here they are counted from 0, no noise, to 1000 for every family:
    PixArt's timesteps, and 1000 times FLUX's sigma or Cascade's t; in PixelFlow those of each stage. released: as the
    family was trained, uniform, but logit_normal for FLUX. uniform. logit_normal: the sigmoid of normal numbers (SD3,
    arXiv 2403.03206, section 3.1) ..."""
    mean: float = 0.0
    """... with this mean, above 0 for more noise, ..."""
    deviation: float = 1.0
    """... and this deviation."""
    shift: float = 1.0
    """Above 1 for more noise: t in [0, 1] becomes shift t / (1 + (shift - 1) t) (SD3, section 5.3.2; OneTrainer has it
    for every family)."""
    min_timestep: float = 0.0
    """Nothing is drawn below, ..."""
    max_timestep: float = 1000.0
    """... and nothing above."""
    quarters: list[float] = field(default_factory=list)
    """How many times as often as otherwise each quarter of the 1000 is drawn, as [1, 1, 2, 0.5]: those of which the
    validation says the loss, the first with the least noise. Empty: as often."""
    offset: float = 0.0
    """Offset noise (crosslabs.org/blog/diffusion-with-offset-noise): so many times one more normal number for each
    channel of a picture, 0.05 to 0.1, for pictures that are dark or light as a whole."""
    pyramid: float = 0.0
    """Multi-resolution noise (J. Whitaker's report of that name; kohya's multires_noise_discount, with 6 iterations):
    what each smaller size counts less, 0.3 for instance; 0 = none."""
    perturbation: float = 0.0
    """Input perturbation (arXiv 2301.11706), 0.1 in the paper: so many times another noise in what the network sees,
    which it is not to predict."""


@dataclass(frozen=True)
class Loss:
    kind: str = "mse"
    """mse; mae; huber: quadratic up to huber_delta and linear beyond, twice torch's; pseudo_huber: the smooth one
    (arXiv 2403.16728), which kohya calls huber."""
    huber_delta: float = 0.1
    """Where both become linear ..."""
    huber_schedule: str = "constant"
    """... at every timestep; or, as in kohya's scripts, less where there is more noise: exponential, huber_delta to the
    power of timestep / 1000; snr, (1 - huber_delta) / (1 + sigma)^2 + huber_delta, sigma the noise over the signal."""
    snr_gamma: float = 0.0
    """Weigh the error by Min-SNR (arXiv 2303.09556) with this gamma, 5 in the paper; for eps, for v, and for FLUX's
    velocity by the same derivation. 0 = not."""
    debiased: bool = False
    """Weigh it by debiased estimation (arXiv 2310.08442): 1 / sqrt(SNR) for eps, what corresponds for the others."""
    unmasked: float = 0.0
    """With data.masks, what the area outside of a mask counts, 0 to 1."""
    normalise_masks: bool = False
    """A small mask counts as much as a large one: divide by the mean of what the area counts."""


@dataclass(frozen=True)
class Log:
    wandb: str = ""
    """Log to Weights & Biases what is logged to tensorboard: online, or offline, into RUN/wandb, which `wandb sync`
    sends later. A run that goes on goes on there. Empty: no."""
    project: str = "pixstack"
    """Project in Weights & Biases and trackio; the run has the name of this one."""
    trackio: bool = False
    """Log the same to trackio, which keeps it on this machine; `trackio show` shows it."""
    webhook: str = ""
    """Address that is sent a sentence as JSON when the run begins, has validated, ends or fails (text for Slack,
    content for Discord); $NAME for one that stands in an environment variable. Empty: none."""


@dataclass(frozen=True)
class SamplePrompt(Table):
    """What is not said is as in [samples]."""

    prompt: str = ""
    class_index: int | None = None
    """Class to draw in a class-conditional run, in place of a prompt."""
    negative: str = ""
    """What guidance leads away from, in place of the empty prompt; counts with cfg other than 1."""
    hint: str = ""
    """A ControlNet's picture for this prompt; of several hints their files with commas between: those of
    data.conditions in their order, then the picture that annotators draw from."""
    strength: float = 1.0
    """How many times an adapter's change counts; 0 = the network without it."""
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    shift: float | None = None
    cfg: float | None = None
    seed: int | None = None
    """Without it, samples.seed plus the place in the list."""


@dataclass(frozen=True)
class Samples:
    every: int = 0
    """Steps between sample grids; 0 = none."""
    baseline: bool = True
    """Draw them before the first step too; of an adapter, the network without it."""
    prompts: list[str | SamplePrompt] = field(default_factory=list)
    """Strings, or tables with settings of their own: [[samples.prompts]]."""
    classes: list[int] = field(default_factory=list)
    steps: int = 10
    """Per stage."""
    shift: float = 1.0
    cfg: float = 4.0
    seed: int = 0
    height: int = 0
    """0 = data.resolution"""
    width: int = 0

    @property
    def texts(self) -> list[str]:
        """The prompts without their settings."""
        return [one if isinstance(one, str) else one.prompt for one in self.prompts]

    @property
    def captions(self) -> list[str]:
        """What a text encoder is asked for: prompts and negative ones."""
        return [*self.texts, *(one.negative for one in self.tables.values())]

    @property
    def tables(self) -> dict[int, SamplePrompt]:
        """Place in `prompts`, from 1 -> its table, where it has one."""
        return {i: one for i, one in enumerate(self.prompts, 1) if not isinstance(one, str)}


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
    noise: Noise = Noise()
    loss: Loss = Loss()
    log: Log = Log()
    samples: Samples = Samples()
    validation: Validation = Validation()

    out: str = "runs/{name}"
    """The run folder. If it holds a checkpoint, the run goes on from there."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint if the settings that shape the result are the same. changed: go on with
    other settings. never: refuse a folder that holds a run."""
    resume_from: int = 0
    """Step of the checkpoint to go on from, in place of the newest; later ones are renamed and stay. 0 = the newest."""
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
    float32_matmul: str = "auto"
    """How NVIDIA GPUs multiply matrices of float32, as torch calls it: highest, in float32; high, in TF32 (10 bits of
    23), several times faster; medium, in bf16. auto: highest with precision=fp32; high with bf16, where only frozen
    encoders and what autocast leaves are in float32. Convolutions are in TF32 anyway."""
    device: str = "auto"
    """auto: the GPUs that accelerate or torchrun gives (CUDA_VISIBLE_DEVICES narrows them), else the CPU. cpu."""
    threads: int = 0
    """CPU threads of torch; 0 = torch's choice."""
    compile: bool = False
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, a third more work."""
    save_every: int = 1000
    """Steps between checkpoints; 0 = not by steps. The last step is always saved."""
    save_minutes: float = 0.0
    """Minutes after which a checkpoint is written, counted from the one before; 0 = not by time."""
    save_epochs: float = 0.0
    """Checkpoints after so many times through the training pictures, 0.5 for instance; 0 = not by epochs."""
    keep: int = 3
    """Newest checkpoints kept; 0 = all."""
    log_every: int = 10
    divergence: float = 5.0
    """Stop where the loss of five lines of the log in a row is so many times the median of the lines before, or the
    gradient norm ten times that. The last checkpoint from before is kept. 0 = never."""

    @property
    def folder(self) -> Path:
        return Path(self.out.format(name=self.name))

    @property
    def needs(self) -> str:
        """What every picture must have: "captions", "classes", or "pictures" where the recipe reads neither."""
        return self.recipe.needs or ("captions" if self.text.encoder else "classes")


def look_up(settings, name: str):
    """The value of "optimizer.warm_up", or of "warm_up" in one section."""
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings
