"""Configuration of a FLUX checkpoint: the shape of its transformer."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from .. import typed
from ..configuration import Configuration

REFERENCE_NAMES = {  # released parameters, diffusers' config.json -> ours
    "vec_in_dim": "pooled_dim",
    "context_in_dim": "context_dim",
    "hidden_size": "hidden",
    "num_heads": "heads",
    "depth_single_blocks": "single_depth",
    "axes_dim": "axes",
    "guidance_embed": "guidance",
    "pooled_projection_dim": "pooled_dim",
    "joint_attention_dim": "context_dim",
    "num_attention_heads": "heads",
    "num_layers": "depth",
    "num_single_layers": "single_depth",
    "axes_dims_rope": "axes",
    "guidance_embeds": "guidance",
}
NOT_OURS = {"patch_size", "out_channels"}  # diffusers writes them; always 1 (tokens come packed) and in_channels
HEAD_AXES = {128: (16, 56, 56)}  # size of a head -> rope channels of (index, row, column) in every release


@dataclass(frozen=True)
class FluxConfig(Configuration):
    hidden: int = 3072
    """Width D of the transformer."""
    heads: int = 24
    axes: tuple[int, int, int] = (16, 56, 56)
    """Channels of a head that turn with (index, row, column); their sum is the size of a head."""
    mlp_hidden: int = 12288
    depth: int = 19
    """Double-stream blocks."""
    single_depth: int = 38
    """Single-stream blocks."""
    in_channels: int = 64
    """Width of an image token: latent channels times 2x2 cells."""
    pooled_dim: int = 768
    """Width of CLIP-L's pooled vector."""
    context_dim: int = 4096
    """Width of the T5 tokens."""
    qkv_bias: bool = True
    guidance: bool = True
    """Whether the distilled guidance is an input (dev) or not (schnell)."""
    theta: int = 10000

    def __post_init__(self):
        object.__setattr__(self, "axes", typed.as_tuple(self.axes))  # JSON has lists
        typed.check(self, "FLUX")
        problems = [
            f"{name}={getattr(self, name)} must be at least {least}."
            for name, least in (("hidden", 1), ("heads", 1), ("mlp_hidden", 1), ("depth", 1), ("single_depth", 0),
                                ("in_channels", 4), ("pooled_dim", 1), ("context_dim", 1), ("theta", 1))
            if getattr(self, name) < least
        ]
        if not problems and self.hidden % self.heads:
            problems.append(f"hidden={self.hidden} is not a multiple of heads={self.heads}.")
        elif not problems and sum(self.axes) != self.head_dim:
            problems.append(f"axes={self.axes} add up to {sum(self.axes)}, a head is {self.head_dim} wide.")
        if len(self.axes) != 3 or any(a < 2 or a % 2 for a in self.axes):
            problems.append(f"axes={self.axes} must be three even numbers: channels turn in pairs.")
        if self.in_channels % 4:
            problems.append(f"in_channels={self.in_channels} must be a multiple of 4: a token holds 2x2 latent cells.")
        if problems:
            raise ValueError("This FLUX configuration cannot work:\n  " + "\n  ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict:
        """Entries under our names, the reference's (`FluxParams`) or diffusers' -> ours.

        Raises ValueError for an entry that is none of them.
        """
        typed.plain(entries, "This FLUX configuration")
        known = {f.name for f in fields(cls)}
        renamed, ratio, head_dim = {}, None, None
        for name, value in entries.items():
            ours = REFERENCE_NAMES.get(name, name)
            if name == "mlp_ratio":
                ratio = value
            elif name == "attention_head_dim":
                head_dim = value
            elif ours in known:
                renamed[ours] = typed.as_tuple(value) if ours == "axes" else value
            elif name not in NOT_OURS and not name.startswith("_"):  # diffusers signs its files: _class_name, ...
                raise ValueError(f"Unknown entry {name!r} in a FLUX configuration; known are "
                                 f"{', '.join(sorted(known | set(REFERENCE_NAMES)))}.")
        if head_dim is not None and "heads" in renamed:
            renamed.setdefault("hidden", head_dim * renamed["heads"])
        if "hidden" in renamed:
            if ratio is not None:
                renamed["mlp_hidden"] = int(renamed["hidden"] * ratio)
            elif "_class_name" in entries:  # diffusers does not say it
                renamed.setdefault("mlp_hidden", 4 * renamed["hidden"])
        return renamed


PRESETS = {"dev": FluxConfig(), "schnell": FluxConfig(guidance=False)}
"""The released checkpoints."""
