"""PixArt's key names: the release's, which are ours, and those of diffusers."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TOP = {  # module of the release -> of diffusers (tools/convert_pixart_alpha_to_diffusers.py of PixArt-alpha@cac2fd3)
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
BLOCK = {  # the same inside a block; several of diffusers are equal parts of the rows, in this order
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.q_norm",),
    "attn.k_norm": ("attn1.k_norm",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
TABLES = {  # keys that are not a module's weight or bias
    "final_layer.scale_shift_table": "scale_shift_table",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
}
NOT_NEEDED = ("pos_embed", "pos_embed.pos_embed")  # tables of positions, which are computed
_FROM_TOP = {theirs: ours for ours, theirs in TOP.items()}
_FROM_TABLES = {theirs: ours for ours, theirs in TABLES.items()}
_FROM_BLOCK = {name: (ours, part) for ours, theirs in BLOCK.items() for part, name in enumerate(theirs)}


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' keys -> the release's; a file that has those already comes back as it is.

    Keys that are in neither stay, so that whoever loads the result can name them. Raises ValueError where one part of
    a fused projection is missing.
    """
    if not any(key.startswith("transformer_blocks.") for key in tensors):
        return dict(tensors)
    top, blocks = {}, {}
    for key, value in tensors.items():
        (blocks if key.startswith("transformer_blocks.") else top)[key] = value
    converted = {}
    for key, value in top.items():
        module, _, suffix = key.rpartition(".")
        if key in _FROM_TABLES:
            converted[_FROM_TABLES[key]] = value
        else:
            converted[f"{_FROM_TOP[module]}.{suffix}" if module in _FROM_TOP else key] = value
    return converted | _blocks_to_original(blocks, "transformer_blocks.{}.", "blocks.{}.")


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's keys -> those of diffusers' PixArtTransformer2DModel, which stores no table and no null caption.

    Raises ValueError for weights that diffusers has no place for.
    """
    converted, blocks = {}, {}
    for key, value in tensors.items():
        module, _, suffix = key.rpartition(".")
        if key.startswith("blocks."):
            blocks[key] = value
        elif key == "final_layer.scale_shift_table":
            converted[TABLES[key]] = value
        elif module in TOP:
            converted[f"{TOP[module]}.{suffix}"] = value
        elif key not in (*NOT_NEEDED, *TABLES):
            raise ValueError(f"diffusers' PixArt has no place for {key}.")
    return converted | _blocks_to_diffusers(blocks, "blocks.{}.", "transformer_blocks.{}.")


def to_original_controlnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{i}.transformer_block.*` of diffusers -> our `{i}.copied_block.*`; projections, and our own names, stay."""
    inner = {k: v for k, v in tensors.items() if ".transformer_block." in k}
    outer = {k: v for k, v in tensors.items() if k not in inner}
    return outer | _blocks_to_original(inner, "{}.transformer_block.", "{}.copied_block.")


def to_diffusers_controlnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our ControlNet's weights under the `controlnet_blocks.*` of diffusers' research project."""
    inner = {k: v for k, v in tensors.items() if ".copied_block." in k}
    outer = {f"controlnet_blocks.{k}": v for k, v in tensors.items() if k not in inner}
    return outer | _blocks_to_diffusers(inner, "{}.copied_block.", "controlnet_blocks.{}.transformer_block.")


def to_released_controlnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our ControlNet's weights under the `controlnet.*` of the release, without the base that it puts beside them."""
    return {f"controlnet.{key}": value for key, value in tensors.items()}


def _blocks_to_original(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """theirs, ours: how the key of block {} begins."""
    converted, parts = {}, {}
    for key, value in tensors.items():
        index, inner_key = _split(key, theirs)
        module, _, suffix = inner_key.rpartition(".")
        if module not in _FROM_BLOCK:
            converted[ours.format(index) + inner_key] = value
            continue
        name, part = _FROM_BLOCK[module]
        if len(BLOCK[name]) == 1:
            converted[f"{ours.format(index)}{name}.{suffix}"] = value
        else:
            parts.setdefault((index, name, suffix), {})[part] = value
    for (index, name, suffix), pieces in parts.items():
        wanted = BLOCK[name]
        if missing := [wanted[i] for i in range(len(wanted)) if i not in pieces]:
            absent = f"{theirs.format(index)}{missing[0]}.{suffix}"
            raise ValueError(f"This PixArt checkpoint is incomplete: it has no {absent}.")
        converted[f"{ours.format(index)}{name}.{suffix}"] = torch.cat([pieces[i] for i in range(len(wanted))])
    return converted


def _blocks_to_diffusers(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    converted = {}
    for key, value in tensors.items():
        index, inner_key = _split(key, ours)
        module, _, suffix = inner_key.rpartition(".")
        if inner_key == "scale_shift_table":
            converted[theirs.format(index) + inner_key] = value
        elif module in BLOCK:
            names = BLOCK[module]
            for name, part in zip(names, value.chunk(len(names)), strict=True):
                converted[f"{theirs.format(index)}{name}.{suffix}"] = part
        else:
            raise ValueError(f"diffusers' PixArt has no place for {key}: it knows no KV compression.")
    return converted


def _split(key: str, pattern: str) -> tuple[int, str]:
    """("blocks.3.attn.proj.bias", "blocks.{}.") -> (3, "attn.proj.bias")."""
    before, after = pattern.split("{}")
    index, _, inner_key = key.removeprefix(before).partition(".")
    return int(index), inner_key.removeprefix(after.removeprefix("."))
