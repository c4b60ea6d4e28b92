"""PixArt's files: the release's .pth with all its wrappers, diffusers folders, ControlNet bundles, our safetensors."""
from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..known_files import family_of, whose
from ..state_dict import metadata_config, without_prefix
from .config import LATENT_SCALES, PRESETS, TOKEN_LIMITS, KVCompression, PixArtConfig
from .model import axis_table, position_table

FAMILY = "pixart"
CONTROLNET_FAMILY = "pixart_controlnet"
RELEASED_HEAD_DIM = 72  # not in keys or shapes: the projections span all heads
ONETRAINER_GRID, ONETRAINER_RANGE = 64, 64.0  # the table that its exports hold, whatever the model

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
NEEDED = ("x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight", "final_layer.linear.weight",
          "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
_FROM_TOP = {theirs: ours for ours, theirs in TOP.items()}
_FROM_TABLES = {theirs: ours for ours, theirs in TABLES.items()}
_FROM_BLOCK = {name: (ours, part) for ours, theirs in BLOCK.items() for part, name in enumerate(theirs)}

RELEASED_FILES = (  # how the name of a released file begins -> preset; the keys of many do not give the resolution
    ("pixart-xl-2-256x256", "alpha_256"),
    ("pixart-xl-2-sam-256x256", "alpha_256"),
    ("pixart-xl-2-512", "alpha_512"),
    ("pixart-alpha-dmd-xl-2-512", "alpha_512"),
    ("pixart-xl-2-1024", "alpha_1024"),
    ("pixart-lcm-xl-2-1024", "alpha_1024"),
    ("pixart-sigma-xl-2-256x256", "sigma_256"),
    ("pixart-sigma-xl-2-512", "sigma_512"),
    ("pixart-sigma-xl-2-1024", "sigma_1024"),
    ("pixart-sigma-xl-2-2k", "sigma_2k"),
    ("pixart-900m-1024", "sigma_900m"),
)
BY_NAME = ("sample_size", "position_range", "latent_scale", "token_limit")  # the entries that such a name gives


def read(
    tensors: Mapping,
    metadata: Mapping[str, str] | None = None,
    weights: str = "ema",
    config: Mapping | None = None,
    beside: Mapping | None = None,
) -> tuple[PixArtConfig, dict[str, Tensor]]:
    """(configuration, weights under the release's key names) from the contents of a file (`state_dict.read_file`).

    weights: "ema" or "model", which of the two to take from a training file; EMA falls back to the model when there is
    none. config: entries (any names of `PixArtConfig.entries_of`) that complete and must not contradict what the shapes
    say; {"variant": "alpha"} is enough where a file could be alpha or Sigma. beside: the same from
    `beside`, which counts where it fits and the file itself says nothing. A ControlNet bundle gives its base model.
    Raises ValueError for a file of another family, or a ControlNet without its base.
    """
    tensors = _unwrap(tensors, weights)
    if any(key.startswith("base_model.") for key in tensors):
        base = {k.removeprefix("base_model."): v for k, v in tensors.items() if k.startswith("base_model.")}
        tensors = without_prefix(base)
    _refuse_others(tensors)
    tensors = to_original(tensors)
    if missing := [key for key in NEEDED if key not in tensors]:
        raise ValueError(f"This PixArt checkpoint is incomplete: it has no {', '.join(missing)}.")

    own = metadata_config(metadata or {}, FAMILY)
    stated = {**PixArtConfig.entries_of(own or {}), **PixArtConfig.entries_of(config or {})}
    stated.pop("null_caption", None)  # the weights say it
    near = {} if own or not beside else _if_it_fits(PixArtConfig.entries_of(beside), tensors)
    hints = {name: near[name] for name in ("mlp_ratio", "kv_compression") if name in near}  # shapes give these in part
    shapes = _from_shapes(tensors, {**hints, **stated})
    known = {**near, **_variant_of(shapes), **_from_table(tensors, shapes), **stated, **shapes}
    return _completed(known), {key: value for key, value in tensors.items() if key not in NOT_NEEDED}


def read_controlnet(
    tensors: Mapping,
    metadata: Mapping[str, str] | None = None,
    weights: str = "ema",
    config: Mapping | None = None,
) -> tuple[PixArtConfig, int, dict[str, Tensor]]:
    """(configuration of its base, number of blocks, weights under the names of `PixArtControlNet`) of a ControlNet.

    Takes the release's bundles, whose base model is left out, files of only the ControlNet under the release's names,
    ours or diffusers' (which SimpleTuner writes too). What neither its blocks nor its base determine comes from
    `config`, which can be the configuration of the model to control (`as_dict()`); without a base it must agree with
    the blocks. Raises ValueError for a file of another family, or a PixArt model.
    """
    tensors = _unwrap(tensors, weights)
    layout = _controlnet_layout(tensors)
    if layout is None:
        raise ValueError(f"This is not a PixArt ControlNet. {whose(tensors)}")
    own = metadata_config(metadata or {}, CONTROLNET_FAMILY)
    net = {m[1]: value for key, value in tensors.items() if (m := layout.fullmatch(key))}
    net = to_original_controlnet(net)
    blocks = 1 + max(int(key.partition(".")[0]) for key in net)
    needed = ("0.before_proj.weight", *(f"{i}.{name}.weight" for i in range(blocks)
                                        for name in ("copied_block.attn.qkv", "copied_block.mlp.fc1", "after_proj")))
    if missing := [key for key in needed if key not in net]:
        raise ValueError(f"This PixArt ControlNet of {blocks} blocks is incomplete: it has no {', '.join(missing[:3])}"
                         f"{' ...' if len(missing) > 3 else ''}.")
    if any(key.startswith("base_model.") for key in tensors):
        return read(tensors, weights=weights, beside=config)[0], blocks, net
    stated = {**PixArtConfig.entries_of(own or {}), **PixArtConfig.entries_of(config or {})}
    shapes = _from_block_shapes(net, "{}.copied_block.", blocks, stated)
    known = {"depth": max(PixArtConfig.depth, blocks + 1), **shapes, **stated}
    return _completed(known), blocks, net


def beside(path: str | os.PathLike) -> dict | None:
    """Entries about a file from beside it: diffusers' `config.json`, with it a `scheduler_config.json` there or in
    `../scheduler`, and `../vae`; or a released name."""
    path = Path(path)
    stated = {}
    for stem, preset in RELEASED_FILES:
        if path.name.lower().startswith(stem) or path.parent.parent.name.lower().startswith(stem):
            stated = {name: getattr(PRESETS[preset], name) for name in BY_NAME}
            break
    transformer = _json(path.with_name("config.json")) or {}
    if transformer.get("norm_type") != "ada_norm_single" or "caption_channels" not in transformer:
        return stated or None
    stated |= PixArtConfig.entries_of(transformer)
    stated |= _from_scheduler(_json(path.with_name("scheduler_config.json"))
                              or _json(path.parent.parent / "scheduler" / "scheduler_config.json") or {})
    pipeline = (_json(path.parent.parent / "model_index.json") or {}).get("_class_name", "")
    variant = next((v for v in LATENT_SCALES if v in pipeline.lower()), None)
    if scale := (_json(path.parent.parent / "vae" / "config.json") or {}).get("scaling_factor"):
        stated["latent_scale"] = scale
        variant = variant or min(LATENT_SCALES, key=lambda name: abs(LATENT_SCALES[name] - scale))
    if variant:
        stated.setdefault("latent_scale", LATENT_SCALES[variant])
        stated.setdefault("token_limit", TOKEN_LIMITS[variant])
    return stated


def metadata(config: PixArtConfig) -> dict[str, str]:
    """Metadata of our exported safetensors: the family and the whole configuration."""
    return {"pixstack.family": FAMILY, "pixstack.config": json.dumps(config.as_dict())}


def metadata_controlnet(config: PixArtConfig) -> dict[str, str]:
    """The same for a ControlNet; config: of the model that it controls."""
    return {"pixstack.family": CONTROLNET_FAMILY, "pixstack.config": json.dumps(config.as_dict())}


# --- Names

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
        index, rest = _split(key, theirs)
        module, _, suffix = rest.rpartition(".")
        if module not in _FROM_BLOCK:
            converted[ours.format(index) + rest] = value
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
        index, rest = _split(key, ours)
        module, _, suffix = rest.rpartition(".")
        if rest == "scale_shift_table":
            converted[theirs.format(index) + rest] = value
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
    index, _, rest = key.removeprefix(before).partition(".")
    return int(index), rest.removeprefix(after.removeprefix("."))


# --- What a file says

def _unwrap(tensors: Mapping, weights: str) -> dict:
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} must be 'ema' or 'model'.")
    for name in (("state_dict_ema", "ema") if weights == "ema" else ()) + ("state_dict", "model"):
        if isinstance(tensors.get(name), Mapping) and tensors[name]:
            return without_prefix(tensors[name])
    return without_prefix(tensors)


def _controlnet_layout(tensors: Mapping) -> re.Pattern | None:
    """Pattern of a ControlNet's keys in this file; its group is our key but for diffusers' names inside a block."""
    for mark, layout in (
        ("controlnet.0.copied_block.scale_shift_table", r"controlnet\.(\d+\..*)"),
        ("0.copied_block.scale_shift_table", r"(\d+\..*)"),
        ("controlnet_blocks.0.transformer_block.scale_shift_table", r"controlnet_blocks\.(\d+\..*)"),
        ("controlnet.controlnet_blocks.0.transformer_block.scale_shift_table",
         r"controlnet\.controlnet_blocks\.(\d+\..*)"),
    ):
        if mark in tensors:
            return re.compile(layout)
    return None


def _refuse_others(tensors: Mapping):
    if family_of(tensors) != "PixArt":
        raise ValueError(f"This is not a PixArt checkpoint. {whose(tensors)}")
    patch = tensors.get("x_embedder.proj.weight", tensors.get("pos_embed.proj.weight"))
    if patch is not None and patch.ndim != 4:
        raise ValueError("This is not a PixArt checkpoint: it has PixArt's keys, but its patches are "
                         f"{list(patch.shape)}, those of a video have one axis more.")


def _from_shapes(tensors: Mapping[str, Tensor], stated: Mapping) -> dict:
    _, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if m)
    null = tensors.get("y_embedder.y_embedding")
    shapes = dict(
        depth=depth,
        patch_size=patch_size,
        in_channels=channels,
        out_channels=tensors["final_layer.linear.weight"].shape[0] // patch_size**2,
        context_dim=tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        micro_conditions="csize_embedder.mlp.0.weight" in tensors,
        **({} if null is None else {"token_limit": null.shape[0]}),
    )
    _refuse_contradictions(shapes, stated)
    shapes |= _from_block_shapes(tensors, "blocks.{}.", depth, stated)
    return {**shapes, "null_caption": null is not None}


def _from_block_shapes(tensors: Mapping[str, Tensor], prefix: str, depth: int, stated: Mapping) -> dict:
    """prefix: how the key of block {} begins."""
    hidden = tensors[prefix.format(0) + "attn.qkv.weight"].shape[1]
    mlp_hidden = tensors[prefix.format(0) + "mlp.fc1.weight"].shape[0]
    ratio = stated.get("mlp_ratio", mlp_hidden / hidden)  # many ratios give one width
    shapes = dict(
        hidden=hidden,
        mlp_ratio=ratio if int(hidden * ratio + 1e-3) == mlp_hidden else mlp_hidden / hidden,
        qk_norm=prefix.format(0) + "attn.q_norm.weight" in tensors,
    )
    _refuse_contradictions(shapes, stated)
    return {**shapes, "kv_compression": _kv_compression(tensors, prefix, depth, stated.get("kv_compression"))}


def _kv_compression(
    tensors: Mapping[str, Tensor], prefix: str, depth: int, stated: KVCompression | None
) -> KVCompression | None:
    """KV compression from the keys, for the convolution, which has weights, else from `stated`."""
    factors = {i: tensors[key].shape[-1] for i in range(depth)
               if (key := f"{prefix.format(i)}attn.sr.weight") in tensors}
    if len(set(factors.values())) > 1:
        raise ValueError(f"The blocks of this PixArt checkpoint compress by different factors: {factors}.")
    present = KVCompression("conv", next(iter(factors.values())), tuple(factors)) if factors else None
    if stated is not None:
        stated = replace(stated, layers=tuple(i for i in stated.layers if i < depth))
        if stated.sampling == "conv" or present:
            _refuse_contradictions({"kv_compression": present}, {"kv_compression": stated if stated.layers else None})
        elif stated.layers:
            return stated
    return present


def _refuse_contradictions(shapes: Mapping, stated: Mapping):
    for name in shapes.keys() & stated.keys():
        if stated[name] != shapes[name]:
            raise ValueError(f"The configuration says {name}={stated[name]}, the weights say {shapes[name]}.")


def _if_it_fits(entries: dict, tensors: Mapping[str, Tensor]) -> dict:
    """`entries` if they describe a network of these shapes, else {}. They may be wrong about the stored caption."""
    try:
        _from_shapes(tensors, {n: value for n, value in entries.items() if n not in ("token_limit", "null_caption")})
    except ValueError:
        return {}
    return entries


def _variant_of(shapes: Mapping) -> dict:
    """Alpha and Sigma have one network, on the latents of two VAEs. Some files show which by what else they hold."""
    for variant, limit in TOKEN_LIMITS.items():
        if shapes.get("token_limit") == limit:
            return {"latent_scale": LATENT_SCALES[variant]}
    return {"latent_scale": LATENT_SCALES["alpha"]} if shapes["micro_conditions"] else {}


def _completed(known: dict) -> PixArtConfig:
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


def _from_table(tensors: Mapping[str, Tensor], shapes: dict) -> dict:
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


def _from_scheduler(scheduler: Mapping) -> dict:
    """Entries from a diffusers scheduler. One that gives no betas has the defaults, which are PixArt's."""
    prediction = {"epsilon": "eps", "v_prediction": "v"}.get(scheduler.get("prediction_type"))
    stated = {"prediction": prediction} if prediction else {}
    if scheduler.get("beta_schedule") in ("linear", "scaled_linear"):
        stated["schedule"] = scheduler["beta_schedule"]
        stated |= {name: scheduler[name] for name in ("beta_start", "beta_end") if scheduler.get(name) is not None}
    if scheduler.get("rescale_betas_zero_snr"):
        stated["zero_terminal_snr"] = True
    return stated


def _json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return entries if isinstance(entries, dict) else None
