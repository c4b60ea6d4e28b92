"""Configuration of a PixArt checkpoint: the shape of its transformer, the latents and the noise of its training."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from .. import typed
from ..configuration import Configuration

VAE_FACTOR = 8  # pixels along one side of a latent cell
LATENT_SCALES = {"alpha": 0.18215, "sigma": 0.13025}  # of sd-vae-ft-ema and of the SDXL VAE
TOKEN_LIMITS = {"alpha": 120, "sigma": 300}
SAMPLINGS = ("conv", "ave", "uniform", "uniform_every")

OTHER_NAMES = {  # of the released training configurations, and of diffusers -> ours
    "input_size": "sample_size",
    "hidden_size": "hidden",
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "num_layers": "depth",
    "caption_channels": "context_dim",
    "model_max_length": "token_limit",
    "micro_condition": "micro_conditions",
    "use_additional_conditions": "micro_conditions",
    "kv_compress_config": "kv_compression",
    "scale_factor": "latent_scale",
}
SCALES = ("pe_interpolation", "lewei_scale", "interpolation_scale")  # of positions, to Sigma, alpha and diffusers
DERIVED = {"variant", "pred_sigma", "attention_head_dim", *SCALES}
NOT_OURS = {  # entries that no inference depends on, or that the weights say better
    "class", "base_class", "copy_blocks_num", "class_dropout_prob", "drop_path", "learn_sigma", "config", "dropout",
    "norm_num_groups", "cross_attention_dim", "attention_bias", "activation_fn", "num_embeds_ada_norm",
    "upcast_attention", "norm_type", "norm_elementwise_affine", "norm_eps", "attention_type", "num_vector_embeds",
    "double_self_attention", "only_cross_attention", "use_linear_projection",
}  # fmt: skip


@dataclass(frozen=True)
class KVCompression:
    """Fewer keys and values in the self attention of some blocks (arXiv 2403.04692, section 3.3)."""

    sampling: str
    """conv: a depthwise convolution and a norm that are weights of the block; ave and uniform: the upper left token of
    every factor x factor tokens, both alike in what they do; uniform_every: every factor-th token in reading order."""
    factor: int
    """Tokens along one side that become one."""
    layers: tuple[int, ...]
    """Indices of the blocks that do it."""

    def __post_init__(self):
        object.__setattr__(self, "layers", typed.as_tuple(self.layers))
        typed.check(self, "KV compression")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"KV compression by {self.sampling!r} is not known; known are {', '.join(SAMPLINGS)}.")
        if self.factor < 2:
            raise ValueError(f"KV compression with factor={self.factor} compresses nothing; it must be at least 2.")


@dataclass(frozen=True)
class PixArtConfig(Configuration):
    depth: int = 28
    hidden: int = 1152
    """Width D of the transformer."""
    heads: int = 16
    patch_size: int = 2
    """Latent cells along one side of a token."""
    in_channels: int = 4
    out_channels: int = 8
    """Twice in_channels where the network also predicts the variance."""
    mlp_ratio: float = 4.0
    context_dim: int = 4096
    """Width of the text tokens."""
    token_limit: int = 300
    """Text tokens that it was trained with: 120 for alpha, 300 for Sigma."""
    micro_conditions: bool = False
    """Whether it is conditioned on the size and the aspect ratio of its picture, as alpha's 1024 model is."""
    qk_norm: bool = False
    kv_compression: KVCompression | None = None
    null_caption: bool = False
    """Whether the file stores y_embedder.y_embedding, (token_limit, context_dim): the caption of an unconditional
    sample in training."""
    position_range: float = 32.0
    """The position of token i of n along a side is i/n times this: 32 for every release but alpha's 256 model, 16."""
    sample_size: int = 128
    """Side in latent cells of the square pictures it was trained on."""
    latent_scale: float = 0.13025
    """Factor that VAE latents are multiplied by."""
    prediction: str = "eps"
    schedule: str = "linear"
    """Growth of beta, linear or scaled_linear ..."""
    beta_start: float = 1e-4
    beta_end: float = 0.02
    """... from the first timestep to the last."""
    zero_terminal_snr: bool = False

    def __post_init__(self):
        if isinstance(self.kv_compression, Mapping):
            object.__setattr__(self, "kv_compression", KVCompression(**self.kv_compression))
        typed.check(self, "PixArt")
        positive = ("depth", "hidden", "heads", "patch_size", "in_channels", "out_channels", "mlp_ratio", "context_dim",
                    "token_limit", "position_range", "sample_size", "latent_scale")
        problems = [f"{name}={getattr(self, name)} must be above 0." for name in positive if getattr(self, name) <= 0]
        if not problems and self.hidden % self.heads:
            problems.append(f"hidden={self.hidden} cannot be split into heads={self.heads} of equal width.")
        if self.hidden % 4:
            problems.append(f"hidden={self.hidden} must be a multiple of 4: sine and cosine of row and column.")
        if self.micro_conditions and self.hidden % 3:
            problems.append(f"hidden={self.hidden} must be a multiple of 3 with micro_conditions: a third each for "
                            "height, width and aspect ratio.")
        if not problems and self.out_channels not in (self.in_channels, 2 * self.in_channels):
            problems.append(f"out_channels={self.out_channels} must be in_channels={self.in_channels}, or twice that "
                            "with a variance.")
        if self.kv_compression and not all(0 <= i < self.depth for i in self.kv_compression.layers):
            problems.append(f"kv_compression names the blocks {list(self.kv_compression.layers)}; with "
                            f"depth={self.depth} there are 0 to {self.depth - 1}.")
        for name, known in (("prediction", ("eps", "v")), ("schedule", ("linear", "scaled_linear"))):
            if getattr(self, name) not in known:
                problems.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            problems.append(f"beta_start={self.beta_start} and beta_end={self.beta_end} must rise from above 0 to "
                            "below 1.")
        if problems:
            raise ValueError("This PixArt configuration cannot work:\n  " + "\n  ".join(problems))

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden * self.mlp_ratio + 1e-3)  # a ratio that came from a width gives that width again

    @property
    def variant(self) -> str:
        """"alpha" or "sigma", by the VAE: they share the network."""
        return min(LATENT_SCALES, key=lambda name: abs(LATENT_SCALES[name] - self.latent_scale))

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return VAE_FACTOR * self.patch_size

    @classmethod
    def from_dict(cls, entries: Mapping) -> PixArtConfig:
        """The configuration of entries under any names that `entries_of` takes; what they leave out has its default."""
        values = cls.entries_of(entries)
        if "variant" in entries:
            values.setdefault("token_limit", TOKEN_LIMITS[entries["variant"]])
        return cls(**values)

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        """Entries under our names, those of a released training configuration or those of diffusers -> ours.

        `variant` ("alpha" or "sigma") stands for the latent scale. Raises ValueError for an entry that is none of them.
        """
        typed.plain(entries, "This PixArt configuration")
        known = {f.name for f in fields(cls)}
        renamed = _derived(entries)
        for name, value in entries.items():
            ours = OTHER_NAMES.get(name, name)
            if ours == "kv_compression":
                renamed[ours] = _kv_compression(value)
            elif ours in known:
                if value is not None:
                    renamed[ours] = value
            elif name not in NOT_OURS | DERIVED and not name.startswith("_"):
                raise ValueError(f"Unknown entry {name!r} in a PixArt configuration; known are "
                                 f"{', '.join(sorted(known | set(OTHER_NAMES) | DERIVED))}.")
        return renamed


def _derived(entries: Mapping) -> dict:
    """Our entries that follow from those without a counterpart of their own."""

    def value(ours, default=None):
        names = (ours, *(theirs for theirs, name in OTHER_NAMES.items() if name == ours))
        return next((entries[name] for name in names if entries.get(name) is not None), default)

    derived = {}
    if "variant" in entries:
        if entries["variant"] not in LATENT_SCALES:
            raise ValueError(f"variant={entries['variant']!r} must be one of {', '.join(LATENT_SCALES)}.")
        derived["latent_scale"] = LATENT_SCALES[entries["variant"]]
    if "attention_head_dim" in entries:
        derived["hidden"] = value("heads", PixArtConfig.heads) * entries["attention_head_dim"]
    if "pred_sigma" in entries:
        derived["out_channels"] = value("in_channels", PixArtConfig.in_channels) * (2 if entries["pred_sigma"] else 1)
    if "lewei_scale" in entries and "MS" in entries.get("base_class", entries.get("class", "")):
        derived["micro_conditions"] = True  # alpha's multi-scale classes always have them
    scale = next((entries[name] for name in SCALES if entries.get(name) is not None), None)
    sample_size = value("sample_size")
    if sample_size and scale is None and "num_attention_heads" in entries:
        scale = max(sample_size // 64, 1)  # what diffusers falls back to
    if sample_size and scale is not None:
        derived["position_range"] = sample_size // value("patch_size", PixArtConfig.patch_size) / scale
    return derived


def _kv_compression(entries: KVCompression | Mapping | None) -> KVCompression | None:
    """Ours, or the `kv_compress_config` of a training configuration, which may say that there is none."""
    if entries is None or isinstance(entries, KVCompression):
        return entries
    if not isinstance(entries, Mapping):
        raise ValueError(f"kv_compression={str(entries)[:60]!r} must be a table of sampling, factor and layers.")
    entries = {{"scale_factor": "factor", "kv_compress_layer": "layers"}.get(k, k): v for k, v in entries.items()}
    if entries.get("sampling") is None or entries.get("factor", 1) == 1 or not entries.get("layers"):
        return None
    return KVCompression(entries["sampling"], int(entries["factor"]), entries["layers"])


_ALPHA = dict(token_limit=TOKEN_LIMITS["alpha"], latent_scale=LATENT_SCALES["alpha"])
PRESETS = {
    "alpha_256": PixArtConfig(**_ALPHA, sample_size=32, position_range=16.0),
    "alpha_512": PixArtConfig(**_ALPHA, sample_size=64),
    "alpha_1024": PixArtConfig(**_ALPHA, sample_size=128, micro_conditions=True),
    "sigma_256": PixArtConfig(sample_size=32),
    "sigma_512": PixArtConfig(sample_size=64),
    "sigma_1024": PixArtConfig(sample_size=128),
    "sigma_2k": PixArtConfig(sample_size=256),
    "sigma_900m": PixArtConfig(sample_size=128, depth=42),
}
"""The released checkpoints, their LCM and DMD versions included, and the community's 900M. Whether a file stores the
null caption depends on its format, so `null_caption` is left out here."""
