"""Configurations of UltraPixel's and Stable Cascade's files: shapes of Stage C, B and A, the guide, the ControlNet."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from .. import typed
from ..configuration import Configuration

REFERENCE_NAMES = {  # constructor arguments of Stability-AI/StableCascade@7a7d341f -> ours
    "c_in": "in_channels",
    "c_out": "out_channels",
    "c_r": "timestep_dim",
    "c_cond": "context_dim",
    "c_hidden": "hidden",
    "nhead": "heads",
    "self_attn": "self_attention",
    "t_conds": "conditions",
    "switch_level": "switch",
    "c_clip_text": "text_dim",
    "c_clip_text_pooled": "pooled_dim",
    "c_clip": "pooled_dim",
    "c_clip_img": "image_dim",
    "c_clip_seq": "pooled_tokens",
    "c_effnet": "semantic_channels",
    "c_pixels": "pixel_channels",
    "c_latent": "latent_channels",
    "c_proj": "hidden",
    "proj_blocks": "blocks",
    "bottleneck_mode": "backbone",
    "ch": "width",
    "n_head": "heads",
    "n_groups": "groups",
    "pe_sigma": "frequency_range",
}
KINDS = "CTAF"  # ResBlock, timestep, attention, feed-forward


def _refuse(what: str, problems: list[str]):
    if problems:
        raise ValueError(f"This {what} configuration cannot work:\n  " + "\n  ".join(problems))


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


class UltraPixelConfiguration(Configuration):
    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        """Entries under our names or the reference's -> ours. Names that belong to no field are passed over: a release
        keeps several networks in one configuration."""
        typed.plain(entries, "This configuration of Stable Cascade")
        known = {f.name for f in fields(cls)}
        renamed = {}
        for name, value in entries.items():
            ours = REFERENCE_NAMES.get(name, name)
            if ours in known:
                renamed[ours] = _frozen(value)
        return renamed


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(UltraPixelConfiguration):
    """Configuration that Stage C and Stage B share: a U-net whose levels are strings of blocks.

    Tuples have one entry a level; those that begin with `up` go from the deepest level to the first, as the net runs.
    """

    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    """Attention heads; -1 in a level without attention."""
    down: tuple[str, ...]
    """Blocks of a level in order: C a ResBlock, T a timestep block, A an attention, F a feed-forward."""
    up: tuple[str, ...]
    down_repeats: tuple[int, ...]
    """Number of runs of a level; a 1x1 convolution is between two runs."""
    up_repeats: tuple[int, ...]
    in_channels: int
    out_channels: int
    patch_size: int
    context_dim: int
    pooled_dim: int = 1280
    pooled_tokens: int = 4
    """Context tokens that a pooled vector becomes."""
    timestep_dim: int = 64
    kernel_size: int = 3
    dropout: tuple[float, ...]
    self_attention: tuple[bool, ...]
    """Whether the attention sees the picture's own tokens beside the context."""
    conditions: tuple[str, ...] = ()
    """Further scalars, embedded as the timestep is; 0 where they are not given."""

    def __post_init__(self):
        typed.check(self, "Stable Cascade")
        levels = len(self.hidden)
        problems = [f"{name} has {len(getattr(self, name))} levels, hidden has {levels}."
                    for name in ("heads", "down", "up", "down_repeats", "up_repeats", "dropout", "self_attention")
                    if len(getattr(self, name)) != levels]
        problems += [f"{name}={getattr(self, name)} must be at least 1."
                     for name in ("in_channels", "out_channels", "patch_size", "context_dim", "pooled_tokens")
                     if getattr(self, name) < 1]
        unknown = sorted(set("".join((*self.down, *self.up))) - set(KINDS))
        if unknown:
            problems.append(f"Blocks {', '.join(unknown)} are unknown; there are {', '.join(KINDS)}.")
        if self.timestep_dim < 4:
            problems.append(f"timestep_dim={self.timestep_dim} must be at least 4.")
        if self.kernel_size % 2 == 0:
            problems.append(f"kernel_size={self.kernel_size} must be odd.")
        if not problems:
            for level, (hidden, heads) in enumerate(zip(self.hidden, self.heads, strict=True)):
                attends = "A" in self.down[level] + self.up[levels - 1 - level]
                if attends and (heads < 1 or hidden % heads):
                    problems.append(f"Level {level} is {hidden} wide, which {heads} heads do not divide.")
        _refuse("Stable Cascade", problems)

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        renamed = super().entries_of(entries)
        if "level_config" in entries and "blocks" in entries:
            (down, up), kinds = entries["blocks"], entries["level_config"]
            renamed["down"] = tuple(kind * count for kind, count in zip(kinds, down, strict=True))
            renamed["up"] = tuple(kind * count for kind, count in zip(reversed(kinds), up, strict=True))
        if entries.get("block_repeat") is not None:
            renamed["down_repeats"], renamed["up_repeats"] = _frozen(entries["block_repeat"])
        levels = len(entries.get("c_hidden", entries.get("hidden", ())))
        for name in ("dropout", "self_attention"):
            if name in renamed and not isinstance(renamed[name], tuple):
                renamed[name] = (renamed[name],) * levels
        return renamed

    def repeated_kinds(self) -> tuple[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
        """The reference's `level_config` and `blocks`: the string that each level repeats, and how many times on the
        way down and up. Raises ValueError for levels that repeat none."""
        kinds = []
        for level, (down, up) in enumerate(zip(self.down, reversed(self.up), strict=True)):
            candidates = (down[:n] for n in range(1, len(down) + 1))
            found = next((k for k in candidates if k * (len(down) // len(k)) == down and k * (len(up) // len(k)) == up),
                         None)
            if not found:
                raise ValueError(f"Level {level} has the blocks {down} on the way down and {up} on the way up: the "
                                 "same few must repeat in both.")
            kinds.append(found)
        counts = (tuple(len(some) // len(kind) for some, kind in zip(self.down, kinds, strict=True)),
                  tuple(len(some) // len(kind) for some, kind in zip(self.up, reversed(kinds), strict=True)))
        return tuple(kinds), counts


@dataclass(frozen=True, kw_only=True)
class StageCConfig(CascadeConfig):
    hidden: tuple[int, ...] = (2048, 2048)
    heads: tuple[int, ...] = (32, 32)
    down: tuple[str, ...] = ("CTA" * 8, "CTA" * 24)
    up: tuple[str, ...] = ("CTA" * 24, "CTA" * 8)
    down_repeats: tuple[int, ...] = (1, 1)
    up_repeats: tuple[int, ...] = (1, 1)
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 1
    context_dim: int = 2048
    text_dim: int = 1280
    image_dim: int = 768
    dropout: tuple[float, ...] = (0.1, 0.1)
    self_attention: tuple[bool, ...] = (True, True)
    conditions: tuple[str, ...] = ("sca", "crp")
    switch: tuple[bool, ...] = (False,)
    """Whether the picture is halved between two levels; the released nets keep its size."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.switch) != len(self.hidden) - 1:
            raise ValueError(f"switch has {len(self.switch)} entries, between {len(self.hidden)} levels there are "
                             f"{len(self.hidden) - 1}.")


@dataclass(frozen=True, kw_only=True)
class StageBConfig(CascadeConfig):
    hidden: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (-1, -1, 20, 20)
    down: tuple[str, ...] = ("CT" * 2, "CT" * 6, "CTA" * 28, "CTA" * 6)
    up: tuple[str, ...] = ("CTA" * 6, "CTA" * 28, "CT" * 6, "CT" * 2)
    down_repeats: tuple[int, ...] = (1, 1, 1, 1)
    up_repeats: tuple[int, ...] = (3, 3, 2, 2)
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 2
    context_dim: int = 1280
    semantic_channels: int = 16
    """Channels of the Stage C latent that it is conditioned on."""
    pixel_channels: int = 3
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)
    self_attention: tuple[bool, ...] = (True, True, True, True)
    conditions: tuple[str, ...] = ("sca",)


@dataclass(frozen=True, kw_only=True)
class StageAConfig(UltraPixelConfiguration):
    levels: int = 2
    bottleneck_blocks: int = 12
    """Blocks of the decoder at the resolution of the latent."""
    hidden: int = 384
    """Width at the resolution of the latent; half as much a level up."""
    latent_channels: int = 4
    scale_factor: float = 0.43
    """The decoder's input is the latent of Stage B times this."""

    def __post_init__(self):
        typed.check(self, "Stage A")
        problems = [f"{name}={getattr(self, name)} must be at least 1."
                    for name in ("levels", "bottleneck_blocks", "hidden", "latent_channels") if getattr(self, name) < 1]
        if not problems and self.hidden % 2 ** (self.levels - 1):
            problems.append(f"hidden={self.hidden} cannot be halved {self.levels - 1} times.")
        _refuse("Stage A", problems)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths from the finest level to that of the latent."""
        return tuple(self.hidden // 2**i for i in reversed(range(self.levels)))

    @property
    def compression(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2**self.levels

    @property
    def halo(self) -> int:
        """Latent cells on each side that a decoded cell depends on; 13 for the release.

        A block sees one cell further; through a transposed convolution of kernel 4 and stride 2 a radius r on the fine
        side is r//2 + 1 on the coarse one.
        """
        radius = 0
        for level in reversed(range(self.levels)):
            radius += self.bottleneck_blocks if level == 0 else 1
            if level:
                radius = radius // 2 + 1
        return radius


@dataclass(frozen=True, kw_only=True)
class GuideConfig(UltraPixelConfiguration):
    """The modules that UltraPixel adds: one for each level of Stage C, on its way down and on its way up."""

    down: tuple[int, ...] = (2048, 2048)
    """Channels of the level's features."""
    up: tuple[int, ...] = (2048, 2048)
    width: int = 1024
    heads: int = 32
    encoder_layers: int = 1
    feedforward: int = 1024
    max_tokens: int = 1024
    """Rows of the position table: cells that the low-resolution features may have."""
    groups: int = 64
    """Weight tokens of one layer of the implicit function; each modulates every `groups`-th of its columns."""
    layers: tuple[int, ...] = (1024, 1024)
    """Outputs of the layers of the implicit function."""
    frequencies: int = 64
    frequency_range: float = 1024.0
    timestep_dim: int = 64
    scale_dim: int = 64
    scale_tokens: int = 576
    """Tokens at which the input of the scale-aware normalisation is 1: those of a 1024x1024 picture."""

    def __post_init__(self):
        typed.check(self, "UltraPixel guide")
        problems = [f"{name}={getattr(self, name)} must be at least 1."
                    for name in ("width", "heads", "groups", "frequencies", "max_tokens") if getattr(self, name) < 1]
        if not problems:
            if self.width % self.heads:
                problems.append(f"width={self.width} is not a multiple of heads={self.heads}.")
            problems += [f"A layer of {size} columns is not a multiple of groups={self.groups}."
                         for size in self.layers if size % min(self.groups, size)]
        if not self.layers or not self.down + self.up:
            problems.append("It needs at least one layer and one level.")
        _refuse("UltraPixel guide", problems)

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        renamed = super().entries_of(entries)
        if "n_head" in entries:  # the U-net's own `heads` is a tuple under another name
            renamed["heads"] = entries["n_head"]
        return renamed


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(UltraPixelConfiguration):
    in_channels: int = 1
    hidden: int = 2048
    """Channels of Stage C where the residuals are added."""
    blocks: tuple[int, ...] = (0, 4, 8, 12, 51, 55, 59, 63)
    """Indices of the ResBlocks of Stage C that get a residual."""
    backbone: str = "effnet"
    """effnet, large or simple."""

    def __post_init__(self):
        typed.check(self, "Stage C ControlNet")
        problems = []
        if self.backbone not in ("effnet", "large", "simple"):
            problems.append(f"backbone={self.backbone!r} must be 'effnet', 'large' or 'simple'.")
        if not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) != len(self.blocks):
            problems.append(f"blocks={self.blocks} must be different numbers from 0 on.")
        _refuse("Stage C ControlNet", problems)

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        renamed = super().entries_of(entries)
        if "backbone" in renamed:
            renamed["backbone"] = renamed["backbone"] or "effnet"
        return renamed


STAGE_C_PRESETS = {
    "3.6b": StageCConfig(),
    "1b": StageCConfig(hidden=(1536, 1536), heads=(24, 24), down=("CTA" * 4, "CTA" * 12), up=("CTA" * 12, "CTA" * 4),
                       context_dim=1536),
}
STAGE_B_PRESETS = {
    "3b": StageBConfig(),
    "700m": StageBConfig(
        hidden=(320, 576, 1152, 1152), heads=(-1, -1, 18, 18), down=("CT" * 2, "CT" * 4, "CTA" * 14, "CTA" * 4),
        up=("CTA" * 4, "CTA" * 14, "CT" * 4, "CT" * 2), up_repeats=(2, 2, 2, 2),
    ),
}
