"""FLUX.1's files: the release (flux1-dev.safetensors), diffusers' transformer, and our own safetensors."""
from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..guard import shape_of
from ..known_files import WrongFile, family_of
from ..state_dict import (
    config_metadata,
    count,
    metadata_config,
    refuse_contradictions,
    refuse_incomplete,
    without_prefix,
)
from .config import HEAD_AXES, FluxConfig

FAMILY = "flux"
HEAD_KEY = "double_blocks.0.img_attn.norm.query_norm.scale"
NEEDED = (
    "img_in.weight", "vector_in.in_layer.weight", "txt_in.weight", "double_blocks.0.img_mlp.0.weight", HEAD_KEY,
)  # fmt: skip
# diffusers' names, in the order in which several are stacked into one of the release
_STREAMS = {
    "img": ("norm1.linear", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0", "norm_q", "norm_k", "ff"),
    "txt": ("norm1_context.linear", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out",
            "norm_added_q", "norm_added_k", "ff_context"),
}
_EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}


def read(
    tensors: Mapping, metadata: Mapping[str, str] | None = None, config: Mapping | None = None
) -> tuple[FluxConfig, dict[str, Tensor]]:
    """(configuration, weights under the released key names) from the contents of a file (`state_dict.read_file`).

    config: entries that complete and must not contradict what the shapes say. Raises ValueError for a file of another
    family, or of a FLUX with more inputs than a latent (Fill, Canny, Depth).
    """
    tensors = without_prefix(tensors)
    if family_of(tensors) != "FLUX":
        raise WrongFile("This is not a FLUX checkpoint.", tensors)
    if "transformer_blocks.0.attn.add_q_proj.weight" in tensors:
        tensors = from_diffusers(tensors)
    tensors = {re.sub(r"\.(query|key)_norm\.weight$", r".\1_norm.scale", key): value  # core's after 0.3.75
               for key, value in tensors.items()}
    refuse_incomplete(tensors, (*NEEDED, "final_layer.linear.weight"), "FLUX checkpoint")
    shapes = from_shapes(tensors)
    out = shape_of(tensors, "final_layer.linear.weight", 2)[0]
    if out != shapes["in_channels"]:
        raise ValueError(f"This FLUX takes tokens of {shapes['in_channels']} values and gives {out}: it wants a second "
                         "picture as input (Fill, Canny, Depth). Only the plain base is supported.")
    own = metadata_config(metadata or {}, FAMILY, FluxConfig) or {}
    stated = {**own, **FluxConfig.entries_of(config or {})}
    return FluxConfig(**complete(shapes, stated)), tensors


def metadata(config: FluxConfig) -> dict[str, str]:
    """Metadata of our exported safetensors: the family and the whole configuration."""
    return config_metadata(FAMILY, config.as_dict())


def from_shapes(tensors: Mapping[str, Tensor]) -> dict:
    """The entries that keys and shapes give of a FLUX trunk, a base's or a ControlNet's: all but axes and theta."""
    hidden, in_channels = shape_of(tensors, "img_in.weight", 2)
    return dict(
        hidden=hidden,
        heads=hidden // shape_of(tensors, HEAD_KEY, 1)[0],
        mlp_hidden=shape_of(tensors, "double_blocks.0.img_mlp.0.weight", 2)[0],
        depth=count(tensors, "double_blocks"),
        single_depth=count(tensors, "single_blocks"),
        in_channels=in_channels,
        pooled_dim=shape_of(tensors, "vector_in.in_layer.weight", 2)[1],
        context_dim=shape_of(tensors, "txt_in.weight", 2)[1],
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in tensors,
        guidance="guidance_in.in_layer.weight" in tensors,
    )


def complete(shapes: Mapping, stated: Mapping) -> dict:
    """Entries of the shapes and of a configuration, merged.

    Raises ValueError where they contradict, or where the rope is neither stated nor a release's.
    """
    refuse_contradictions(shapes, stated)
    entries = {**shapes, **stated}
    if "axes" not in entries:
        head_dim = entries["hidden"] // entries["heads"]
        if head_dim not in HEAD_AXES:
            raise ValueError(f"The heads of this checkpoint are {head_dim} wide, those of the releases 128, and its "
                             "keys do not say how they turn with the position. Give its configuration (axes_dim).")
        entries["axes"] = HEAD_AXES[head_dim]
    return entries


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A FluxTransformer2DModel's weights under the released key names. Keys it does not know stay as they are."""
    remaining, ours = dict(tensors), {}

    def move(new: str, *olds: str, change=None):
        for kind in ("weight", "bias"):
            if all(f"{old}.{kind}" in remaining for old in olds):
                parts = [remaining.pop(f"{old}.{kind}") for old in olds]
                joined = parts[0] if len(parts) == 1 else torch.cat(parts)
                ours[f"{new}.{kind}"] = joined if change is None else change(joined)

    def move_norm(new: str, old: str):
        if f"{old}.weight" in remaining:
            ours[f"{new}.scale"] = remaining.pop(f"{old}.weight")

    for old, new in _EMBEDDERS.items():
        move(new, old)
    # diffusers keeps (scale, shift), the release (shift, scale)
    move("final_layer.adaLN_modulation.1", "norm_out.linear", change=lambda w: torch.cat(w.chunk(2)[::-1]))
    for i in range(count(tensors, "transformer_blocks")):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, (modulation, qkv, proj, query, key, mlp) in _STREAMS.items():
            move(f"{new}.{stream}_mod.lin", f"{old}.{modulation}")
            move(f"{new}.{stream}_attn.qkv", *(f"{old}.{name}" for name in qkv))
            move(f"{new}.{stream}_attn.proj", f"{old}.{proj}")
            move_norm(f"{new}.{stream}_attn.norm.query_norm", f"{old}.attn.{query}")
            move_norm(f"{new}.{stream}_attn.norm.key_norm", f"{old}.attn.{key}")
            move(f"{new}.{stream}_mlp.0", f"{old}.{mlp}.net.0.proj")
            move(f"{new}.{stream}_mlp.2", f"{old}.{mlp}.net.2")
    for i in range(count(tensors, "single_transformer_blocks")):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        move(f"{new}.linear2", f"{old}.proj_out")
        move_norm(f"{new}.norm.query_norm", f"{old}.attn.norm_q")
        move_norm(f"{new}.norm.key_norm", f"{old}.attn.norm_k")
    return {**ours, **remaining}
