"""PixArt's files: the release's .pth with all its wrappers, diffusers folders, ControlNet bundles, our safetensors."""
from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .. import typed
from ..known_files import WrongFile, family_of
from ..parsing import from_json
from ..state_dict import (
    config_metadata,
    count,
    metadata_config,
    refuse_incomplete,
    signs_of,
    unwrapped,
    without_prefix,
)
from .config import LATENT_SCALES, PRESETS, TOKEN_LIMITS, PixArtConfig
from .detection import completed, from_block_shapes, from_shapes, from_table, if_it_fits, variant_of
from .key_names import NOT_NEEDED, to_original, to_original_controlnet

FAMILY = "pixart"
CONTROLNET_FAMILY = "pixart_controlnet"
OF_EMA = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
"""What diffusers' EMAModel writes into a config.json."""
NEEDED = ("x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight", "final_layer.linear.weight",
          "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")

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
    ("pixart-sigma-nitro", "sigma_1024"),
    ("yoso_pixart512", "alpha_512"),
    ("yoso_pixart1024", "alpha_1024"),
    ("yoso-pixart512", "alpha_512"),
    ("yoso-pixart1024", "alpha_1024"),
)
PREDICTS_V = ("yoso_pixart512", "yoso-pixart512")
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
    signs = signs_of(tensors)
    tensors = _unwrap(tensors, weights)
    if any(key.startswith("base_model.") for key in tensors):
        base = {k.removeprefix("base_model."): v for k, v in tensors.items() if k.startswith("base_model.")}
        tensors = _of_bundle(without_prefix(base), beside or {})
    _refuse_others(tensors)
    tensors = to_original(tensors)
    refuse_incomplete(tensors, NEEDED, "PixArt checkpoint")

    own = metadata_config(metadata or {}, FAMILY)
    stated = {**_own(own), **PixArtConfig.entries_of(config or {})}
    stated.pop("null_caption", None)  # the weights say it
    near = {} if own or not beside else if_it_fits(PixArtConfig.entries_of(beside), tensors)
    near |= {} if own else signs
    hints = {name: near[name] for name in ("mlp_ratio", "kv_compression") if name in near}  # shapes give these in part
    shapes = from_shapes(tensors, {**hints, **stated})
    known = {**near, **variant_of(shapes), **from_table(tensors, shapes), **stated, **shapes}
    return completed(known), {key: value for key, value in tensors.items() if key not in NOT_NEEDED}


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
        raise WrongFile("This is not a PixArt ControlNet.", tensors)
    own = metadata_config(metadata or {}, CONTROLNET_FAMILY)
    net = {m[1]: value for key, value in tensors.items() if (m := layout.fullmatch(key))}
    blocks = count((f"controlnet.{key}" for key in net), "controlnet")
    net = to_original_controlnet(net)
    needed = ("0.before_proj.weight", *(f"{i}.{name}.weight" for i in range(blocks)
                                        for name in ("copied_block.attn.qkv", "copied_block.mlp.fc1", "after_proj")))
    refuse_incomplete(net, needed, f"PixArt ControlNet of {blocks} blocks")
    if any(key.startswith("base_model.") for key in tensors):
        return read(tensors, weights=weights, beside=config)[0], blocks, net
    stated = {**_own(own), **PixArtConfig.entries_of(config or {})}
    shapes = from_block_shapes(net, "{}.copied_block.", blocks, stated)
    known = {"depth": max(PixArtConfig.depth, blocks + 1), **shapes, **stated}
    return completed(known), blocks, net


def beside(path: str | os.PathLike) -> dict | None:
    """Entries about a file from beside it: diffusers' `config.json`, with it a `scheduler_config.json` there or in
    `../scheduler`, and `../vae`; or a released name."""
    path = Path(path)
    stated = {}
    for stem, preset in RELEASED_FILES:
        if path.name.lower().startswith(stem) or path.parent.parent.name.lower().startswith(stem):
            stated = {name: getattr(PRESETS[preset], name) for name in BY_NAME}
            if stem in PREDICTS_V:
                stated["prediction"] = "v"
            break
    transformer = _json(path.with_name("config.json")) or {}
    if transformer.get("norm_type") != "ada_norm_single" or "caption_channels" not in transformer:
        return stated or None
    stated |= PixArtConfig.entries_of({k: v for k, v in transformer.items() if k not in OF_EMA})
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
    return config_metadata(FAMILY, config.as_dict())


def metadata_controlnet(config: PixArtConfig) -> dict[str, str]:
    """Metadata of an exported ControlNet; config: of the model that it controls."""
    return config_metadata(CONTROLNET_FAMILY, config.as_dict())

def _own(entries: Mapping | None) -> dict:
    """The entries of a file's own metadata, by kind."""
    named = PixArtConfig.entries_of(entries or {})
    return typed.entries(PixArtConfig, named, "The configuration in this file's metadata")


def _unwrap(tensors: Mapping, weights: str) -> dict:
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} must be 'ema' or 'model'.")
    return unwrapped(tensors, (*(("state_dict_ema", "ema") if weights == "ema" else ()), "state_dict", "model"))


def _of_bundle(base: dict, beside: Mapping) -> dict:
    """The base of a ControlNet bundle. The release's forward for 512 pixels never looks at the embedders of sizes that
    a multi-scale base brings along (diffusion/model/nets/pixart_controlnet.py, ControlPixArtHalf)."""
    stored = base.get("pos_embed")
    side = math.isqrt(stored.shape[1]) * 2 if isinstance(stored, Tensor) and stored.ndim == 3 else None
    if (side or beside.get("sample_size")) == PRESETS["alpha_512"].sample_size:
        return {key: value for key, value in base.items() if not key.startswith(("csize_embedder.", "ar_embedder."))}
    return base


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
        raise WrongFile("This is not a PixArt checkpoint.", tensors)
    patch = tensors.get("x_embedder.proj.weight", tensors.get("pos_embed.proj.weight"))
    if patch is not None and patch.ndim != 4:
        raise ValueError("This is not a PixArt checkpoint: it has PixArt's keys, but its patches are "
                         f"{list(patch.shape)}, those of a video have one axis more.")

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
    entries = from_json(path.read_bytes(), str(path))
    return entries if isinstance(entries, dict) else None
