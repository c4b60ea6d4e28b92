"""PixArt's configuration from the shapes of its weights, and the release's values for what they leave open."""
from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..guard import shape_of
from ..state_dict import count, refuse_contradictions
from .config import LATENT_SCALES, PRESETS, TOKEN_LIMITS, KVCompression, PixArtConfig
from .model import axis_table, position_table

RELEASED_HEAD_DIM = 72  # not in keys or shapes: the projections span all heads
ONETRAINER_GRID, ONETRAINER_RANGE = 64, 64.0  # the table that its exports hold, whatever the model


def from_shapes(tensors: Mapping[str, Tensor], stated: Mapping) -> dict:
    _, channels, patch_size, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    depth = count(tensors, "blocks")
    null = "y_embedder.y_embedding"
    shapes = dict(
        depth=depth,
        patch_size=patch_size,
        in_channels=channels,
        out_channels=shape_of(tensors, "final_layer.linear.weight", 2)[0] // patch_size**2,
        context_dim=shape_of(tensors, "y_embedder.y_proj.fc1.weight", 2)[1],
        micro_conditions="csize_embedder.mlp.0.weight" in tensors,
        **({"token_limit": shape_of(tensors, null, 2)[0]} if null in tensors else {}),
    )
    refuse_contradictions(shapes, stated)
    shapes |= from_block_shapes(tensors, "blocks.{}.", depth, stated)
    return {**shapes, "null_caption": null in tensors}


def from_block_shapes(tensors: Mapping[str, Tensor], prefix: str, depth: int, stated: Mapping) -> dict:
    """prefix: how the key of block {} begins."""
    hidden = shape_of(tensors, prefix.format(0) + "attn.qkv.weight", 2)[1]
    mlp_hidden = shape_of(tensors, prefix.format(0) + "mlp.fc1.weight", 2)[0]
    ratio = stated.get("mlp_ratio", mlp_hidden / hidden)  # many ratios give one width
    shapes = dict(
        hidden=hidden,
        mlp_ratio=ratio if int(hidden * ratio + 1e-3) == mlp_hidden else mlp_hidden / hidden,
        qk_norm=prefix.format(0) + "attn.q_norm.weight" in tensors,
    )
    refuse_contradictions(shapes, stated)
    return {**shapes, "kv_compression": _kv_compression(tensors, prefix, depth, stated.get("kv_compression"))}


def _kv_compression(
    tensors: Mapping[str, Tensor], prefix: str, depth: int, stated: KVCompression | None
) -> KVCompression | None:
    """KV compression from the keys, for the convolution, which has weights, else from `stated`."""
    factors = {i: shape_of(tensors, key, 4)[-1] for i in range(depth)
               if (key := f"{prefix.format(i)}attn.sr.weight") in tensors}
    if len(set(factors.values())) > 1:
        raise ValueError(f"The blocks of this PixArt checkpoint compress by different factors: {factors}.")
    present = KVCompression("conv", next(iter(factors.values())), tuple(factors)) if factors else None
    if stated is not None:
        stated = replace(stated, layers=tuple(i for i in stated.layers if i < depth))
        if stated.sampling == "conv" or present:
            refuse_contradictions({"kv_compression": present}, {"kv_compression": stated if stated.layers else None})
        elif stated.layers:
            return stated
    return present


def if_it_fits(entries: dict, tensors: Mapping[str, Tensor]) -> dict:
    """`entries` if they describe a network of these shapes, else {}. They may be wrong about the stored caption."""
    try:
        from_shapes(tensors, {n: value for n, value in entries.items() if n not in ("token_limit", "null_caption")})
    except ValueError:
        return {}
    return entries


def variant_of(shapes: Mapping) -> dict:
    """Alpha and Sigma have one network, on the latents of two VAEs. Some files show which by what else they hold."""
    for variant, limit in TOKEN_LIMITS.items():
        if shapes.get("token_limit") == limit:
            return {"latent_scale": LATENT_SCALES[variant]}
    return {"latent_scale": LATENT_SCALES["alpha"]} if shapes["micro_conditions"] else {}


def completed(known: dict) -> PixArtConfig:
    """The entries, with the release's values for everything that is not known."""
    if "heads" not in known:
        if known["hidden"] % RELEASED_HEAD_DIM:
            raise ValueError(
                f"This PixArt checkpoint is {known['hidden']} wide, which is not a multiple of the head size "
                f"{RELEASED_HEAD_DIM}, and its keys do not give its own. Put the config.json of its training beside it."
            )
        known["heads"] = known["hidden"] // RELEASED_HEAD_DIM
    if "latent_scale" not in known:
        known["latent_scale"] = LATENT_SCALES["sigma"]
        if known["depth"] != PRESETS["sigma_900m"].depth:
            logging.getLogger(__name__).warning(
                "This file does not say whether it is PixArt-alpha or PixArt-Sigma. It is taken for Sigma, which has "
                "the VAE of SDXL: say which it is if the pictures come out garbled."
            )
    variant = PixArtConfig(**known).variant
    known.setdefault("token_limit", TOKEN_LIMITS[variant])
    if variant == "alpha" and known.get("sample_size") == PRESETS["alpha_256"].sample_size:
        known.setdefault("position_range", PRESETS["alpha_256"].position_range)
    return PixArtConfig(**known)


def from_table(tensors: Mapping[str, Tensor], shapes: dict) -> dict:
    """sample_size and position_range from the table of positions that a single-scale network stores.

    It is not believed where the network computes its own (micro-conditioned ones always do), where it is not such a
    table at all, or where it is the one that OneTrainer writes into every export.
    """
    stored = tensors.get("pos_embed")
    if stored is None or stored.ndim != 3 or stored.shape[-1] != shapes["hidden"] or shapes["micro_conditions"]:
        return {}
    n = math.isqrt(stored.shape[1])
    if n < 2 or n * n != stored.shape[1]:
        return {}
    size = {"sample_size": n * shapes["patch_size"]}
    if stored.is_meta:
        return size
    position_range = _fitted_range(stored[0].double(), n)
    if position_range is None or (n, position_range) == (ONETRAINER_GRID, ONETRAINER_RANGE):
        return {}
    return {**size, "position_range": position_range}


def _fitted_range(stored: Tensor, n: int) -> float | None:
    """The position_range of a table for n x n tokens, (n*n, D); None if it is not such a table."""
    D = stored.shape[1]
    slow = D // 8  # a frequency of 1/100, whose sine and cosine leave no doubt how far the second column turns
    step = torch.atan2(stored[1, slow], stored[1, D // 4 + slow]).item() * 10000.0 ** (slow / (D // 4))
    for column in [*(2**i for i in range((n - 1).bit_length() - 1)), n - 1]:  # finer and finer, at frequency 1
        turn = math.atan2(stored[column, 0], stored[column, D // 4])
        step = (turn + 2 * math.pi * round((step * column - turn) / (2 * math.pi))) / column
    fitted = step * n
    if abs(fitted - round(fitted)) < 0.02:  # half precision has blurred it
        fitted = float(round(fitted))
    if not fitted > 0:
        return None
    axis = axis_table(n, D // 2, fitted, dtype=torch.float64)
    return fitted if (position_table(axis, axis) - stored).abs().max() < 0.02 else None
