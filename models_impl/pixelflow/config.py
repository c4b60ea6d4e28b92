"""Configuration of a PixelFlow checkpoint: the shape of its transformer and the cascade that it was trained for."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from .. import typed
from ..configuration import Configuration

REFERENCE_NAMES = {  # the released config.yaml -> ours
    "num_attention_heads": "heads",
    "attention_head_dim": "head_dim",
    "cross_attention_dim": "context_dim",
}
MOST_STAGES = 8
NOT_OURS = {"dropout", "class_dropout_prob"}  # entries of released configurations that no inference depends on


@dataclass(frozen=True)
class PixelFlowConfig(Configuration):
    heads: int
    head_dim: int
    depth: int
    patch_size: int = 4
    """Pixels along one side of a token."""
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    """Classes without the null class, whose index is `num_classes`; 0: no class embedding."""
    context_dim: int | None = None
    """Width of the text tokens; None: no cross attention."""
    attention_bias: bool = True
    num_stages: int = 4
    """Resolutions of the cascade, each twice the one before."""
    resolution: int = 256
    """Side in pixels of the square pictures it was trained on."""

    def __post_init__(self):
        typed.check(self, "PixelFlow")
        problems = [
            f"{name}={getattr(self, name)} must be at least 1."
            for name in ("heads", "head_dim", "depth", "patch_size", "in_channels", "out_channels", "num_stages")
            if getattr(self, name) < 1
        ]
        if self.num_stages > MOST_STAGES:
            problems.append(f"num_stages={self.num_stages} must be at most {MOST_STAGES}: each doubles both sides.")
        if self.head_dim % 4:
            problems.append(f"head_dim={self.head_dim} must be a multiple of 4: half turns with the column, half with "
                            "the row, both in pairs.")
        if self.num_classes < 0:
            problems.append(f"num_classes={self.num_classes} must not be negative.")
        if not problems and self.resolution % self.size_multiple:
            problems.append(f"resolution={self.resolution} is not a multiple of {self.size_multiple} "
                            f"(patch_size={self.patch_size} times 2^(num_stages-1), num_stages={self.num_stages}).")
        if problems:
            raise ValueError("This PixelFlow configuration cannot work:\n  " + "\n  ".join(problems))

    @property
    def hidden(self) -> int:
        """Width D of the transformer."""
        return self.heads * self.head_dim

    @property
    def text_conditional(self) -> bool:
        return self.context_dim is not None

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this, so that stage 0 still has whole tokens."""
        return self.patch_size * 2 ** (self.num_stages - 1)

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        """Entries under our names or those of the released `config.yaml` (nested or not) -> ours.

        Raises ValueError for an entry that is neither.
        """
        typed.plain(entries, "This PixelFlow configuration")
        if "model" in entries:
            entries = {**entries["model"].get("params", entries["model"]), "scheduler": entries.get("scheduler", {})}
        known = {f.name for f in fields(cls)}
        renamed = {}
        for name, value in entries.items():
            ours = REFERENCE_NAMES.get(name, name)
            if name == "scheduler":
                stages = value.get("params", value).get("num_stages")
                renamed.update({} if stages is None else {"num_stages": stages})
            elif ours in known:
                renamed[ours] = value
            elif name not in NOT_OURS:
                raise ValueError(f"Unknown entry {name!r} in a PixelFlow configuration; known are "
                                 f"{', '.join(sorted(known | set(REFERENCE_NAMES)))}.")
        return renamed


_XL = dict(heads=16, head_dim=72, depth=28)
PRESETS = {
    "xl_c2i": PixelFlowConfig(**_XL, num_classes=1000, resolution=256),
    "xl_t2i": PixelFlowConfig(**_XL, context_dim=2048, resolution=1024),
    "emoji": PixelFlowConfig(heads=4, head_dim=64, depth=6, context_dim=192, num_stages=3, resolution=64),
}
"""The released checkpoints, and the small one that this repository ships in `assets/`."""
