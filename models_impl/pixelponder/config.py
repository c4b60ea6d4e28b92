"""Configuration of a PixelPonder checkpoint: a short FLUX trunk, the kinds of hints, and the selection of patches."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from .. import typed
from ..configuration import Configuration
from ..flux.config import FluxConfig

TYPES = ("canny", "openpose", "depth", "hed")  # of the release, in the order of their stems
HINT_CHANNELS = 16
SELECT_REFERENCE_NAMES = {"hidden_size": "hidden", "num_heads": "heads"}
# Sizes come from the picture here; the rope is the trunk's; the release has one block per type
SELECT_NOT_OURS = {"input_shape", "in_channel", "axes_dim", "theta", "depth", "type2id"}
BASE_ONLY = {"depth", "depth_single_blocks", "patch_size"}  # entries about FLUX itself in the reference's parameters


@dataclass(frozen=True)
class SelectConfig:
    """The released selection network (PatchSelectNetwork, SelectNet.py), one attention block per type."""

    hidden: int = 3072
    heads: int = 24
    mlp_hidden: int = 12288
    in_channels: int = 64
    """Width of a hint token: channels times 2x2 cells."""
    types: int = len(TYPES)
    patch_size: int = 2
    """Latent cells along one side of a patch."""
    select_num: int | None = None
    """Patches taken in a round; None: as many as a row of the picture has, 32 at 512 pixels."""
    qkv_bias: bool = False

    def __post_init__(self):
        typed.check(self, "selection network")
        problems = [f"{name}={getattr(self, name)} must be at least 1."
                    for name in ("hidden", "heads", "mlp_hidden", "types") if getattr(self, name) < 1]
        if self.patch_size < 2 or self.patch_size % 2:
            problems.append(f"patch_size={self.patch_size} must be a multiple of 2, the side of a token.")
        if self.in_channels < 4 or self.in_channels % 4:
            problems.append(f"in_channels={self.in_channels} must be a multiple of 4: a token holds 2x2 cells.")
        if self.select_num is not None and self.select_num < 1:
            problems.append(f"select_num={self.select_num} must be at least 1.")
        if not problems and self.hidden % self.heads:
            problems.append(f"hidden={self.hidden} is not a multiple of heads={self.heads}.")
        if problems:
            raise ValueError("This selection network cannot work:\n  " + "\n  ".join(problems))

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        """Entries under our names or the reference's -> ours. Raises ValueError for an entry that is neither."""
        typed.plain(entries, "This selection network's configuration")
        known = {f.name for f in fields(cls)}
        renamed, ratio = {}, None
        for name, value in entries.items():
            ours = SELECT_REFERENCE_NAMES.get(name, name)
            if name == "mlp_ratio":
                ratio = value
            elif ours in known:
                renamed[ours] = value
            elif name not in SELECT_NOT_OURS:
                raise ValueError(f"Unknown entry {name!r} of a selection network; known are "
                                 f"{', '.join(sorted(known | set(SELECT_REFERENCE_NAMES)))}.")
        if entries.get("depth", 1) != 1:
            raise ValueError(f"The selection network has depth={entries['depth']}, the released one 1.")
        if ratio is not None and "hidden" in renamed:
            renamed["mlp_hidden"] = int(renamed["hidden"] * ratio)
        return renamed


@dataclass(frozen=True)
class SelectorConfig:
    """Our selector that learns (`accumulate.Selector`)."""

    width: int = 768
    """A multiple of the trunk's head size: its heads turn by the same rope."""
    depth: int = 1

    def __post_init__(self):
        typed.check(self, "selector")
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"A selector needs width={self.width} and depth={self.depth} of at least 1.")


@dataclass(frozen=True)
class PixelPonderConfig(Configuration):
    trunk: FluxConfig = field(default_factory=lambda: FluxConfig(depth=2, single_depth=2))
    """Shape of the trunk; its depth is the number of double-stream blocks. FLUX uses only as many
    single-stream blocks; the release has twice as many and computes the rest for nothing."""
    types: tuple[str, ...] = TYPES
    """Kinds of hints, in the order of their stems."""
    select: SelectConfig | None = None
    """The released selection network, if it is to be kept."""
    selector: SelectorConfig | None = None
    """Our own, if the file has one."""
    text_tokens: int = 512
    """Text tokens that it was trained with. Residuals reach the text by position, so a shorter padding gives another
    picture."""

    def __post_init__(self):
        object.__setattr__(self, "types", typed.as_tuple(self.types))  # JSON has lists
        typed.check(self, "PixelPonder")
        problems, trunk = [], self.trunk
        if trunk.in_channels != 4 * HINT_CHANNELS:
            problems.append(f"in_channels={trunk.in_channels} of the trunk must be {4 * HINT_CHANNELS}: hints have "
                            f"{HINT_CHANNELS} channels and are added to its tokens.")
        if not self.types or len(set(self.types)) != len(self.types):
            problems.append(f"types={self.types} must be different names, at least one.")
        if trunk.single_depth < trunk.depth:
            problems.append(f"single_depth={trunk.single_depth} is less than depth={trunk.depth}: FLUX takes as many "
                            "residuals of each kind.")
        if self.select is not None:
            for name in ("hidden", "heads", "in_channels"):
                ours, theirs = getattr(trunk, name), getattr(self.select, name)
                if ours != theirs:
                    problems.append(f"The trunk has {name}={ours}, the selection network {theirs}.")
            if self.select.types != len(self.types):
                problems.append(f"The selection network has blocks for {self.select.types} types, there are "
                                f"{len(self.types)}.")
        if self.text_tokens < 1:
            problems.append(f"text_tokens={self.text_tokens} must be at least 1.")
        if self.selector is not None and self.selector.width % trunk.head_dim:
            problems.append(f"The selector's width={self.selector.width} is not a multiple of the head size "
                            f"{trunk.head_dim}.")
        if problems:
            raise ValueError("This PixelPonder configuration cannot work:\n  " + "\n  ".join(problems))

    def type_index(self, kind: str) -> int:
        """The stem that belongs to a kind of hint; raises ValueError for one it was not trained with."""
        if kind not in self.types:
            raise ValueError(f"This PixelPonder checkpoint knows no hints of the kind {kind!r}; it knows "
                             f"{', '.join(self.types)}.")
        return self.types.index(kind)

    def without_unused(self) -> PixelPonderConfig:
        """This configuration without the single-stream blocks whose results FLUX never takes."""
        return replace(self, trunk=replace(self.trunk, single_depth=self.trunk.depth))

    @classmethod
    def from_dict(cls, entries: Mapping) -> PixelPonderConfig:
        """The configuration of our `as_dict`, or from the reference's complete parameters."""
        values = cls.entries_of(entries)
        for name, kind in (("trunk", FluxConfig), ("select", SelectConfig), ("selector", SelectorConfig)):
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        return cls(**values)

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        """{"trunk", "types", "select", "selector"} as far as stated, from our names or the reference's (`FluxParams`
        and controlnet_depth, type2id, select_net). Raises ValueError for an entry that is neither.
        """
        typed.plain(entries, "This PixelPonder configuration")
        if "trunk" in entries:
            return dict(entries)
        renamed, trunk = {}, {}
        for name, value in entries.items():
            if name == "type2id":
                if sorted(value.values()) != list(range(len(value))):
                    raise ValueError(f"type2id={value} must number its types from 0 without gaps.")
                renamed["types"] = tuple(sorted(value, key=value.get))
            elif name == "select_net":
                renamed["select"] = SelectConfig.entries_of(value)
            elif name == "controlnet_depth":
                trunk |= {"depth": value, "single_depth": 2 * value}
            elif name == "types":
                renamed["types"] = tuple(value)
            elif name not in BASE_ONLY:
                trunk |= {name: value}
        return {**renamed, "trunk": FluxConfig.entries_of(trunk)}


PRESETS = {"released": PixelPonderConfig()}
"""pixelponder-fp32.bin without what never reaches FLUX."""
