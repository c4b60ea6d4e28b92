"""Weights in and out of files, with errors that say what was wrong with which file."""
from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIXES = ("module.", "model.diffusion_model.", "_orig_mod.", "diffusion_model.")

MARKS = {  # family, as a person knows it -> keys of which one is enough to know it by, any prefix removed
    "a personalisation of UltraPixel": ("0.lora_up",),
    "a LoRA": ("*.lora_A.weight", "*.lora_down.weight", "*.lora_A.default.weight", "*.lokr_w1", "*.hada_w1_a"),
    "a PixArt ControlNet": ("controlnet.0.copied_block.scale_shift_table", "0.copied_block.scale_shift_table",
                            "controlnet_blocks.0.transformer_block.scale_shift_table"),
    "LTX-Video": ("patchify_proj.weight",),  # before PixArt, whose adaLN it has too
    "PixArt": ("blocks.0.scale_shift_table", "adaln_single.emb.timestep_embedder.linear_1.weight"),
    "PixelPonder": ("input_hint_block_list_moe.0.0.weight", "select_net.attn_block.0.img_attn.qkv.weight"),
    "a ControlNet for FLUX": ("controlnet_blocks.0.weight", "controlnet_x_embedder.weight"),
    "FLUX": ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.proj_mlp.weight"),
    "Stable Cascade Stage C": ("clip_txt_pooled_mapper.weight",),
    "Stable Cascade Stage B": ("clip_mapper.weight",),
    "UltraPixel": ("*.wtoken_postfc.wb0.1.weight",),
    "Stable Diffusion": ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "Stable Diffusion 3": ("joint_blocks.0.context_block.attn.qkv.weight",),
    "DiT": ("blocks.0.adaLN_modulation.1.weight",),
    "a T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "a CLIP text encoder": ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "a VAE": ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"),
    "PixelFlow": ("latent_size_embedder.linear_1.weight",),
}


def read_file(path: str | os.PathLike) -> tuple[dict, dict[str, str]]:
    """Tensors (nested as the file has them) and text metadata of a safetensors or torch file.

    Nothing in the file is executed: torch files are read with `weights_only=True`. Raises FileNotFoundError, or
    ValueError for a file that is truncated, is no checkpoint, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty: the download did not finish. Delete it and download it again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        if path.suffix == ".safetensors" and not _is_torch_file(path):
            raise ValueError(
                f"{path.name} is not a whole safetensors file ({error}): {path.stat().st_size:,} bytes are there. "
                "Compare its size with the original and download it again."
            ) from error
    return _read_torch_file(path), {}


def _is_torch_file(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(2)
    return start in (b"PK", b"\x80\x02", b"\x80\x04")


def _read_torch_file(path: Path) -> dict:
    if not _is_torch_file(path):
        raise ValueError(f"{path.name} is neither a safetensors nor a torch file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training files keep their arguments in one
            with open(path, "rb") as file:  # by name, torch.load would believe the suffix .safetensors
                named = path.suffix == ".safetensors"
                tensors = torch.load(file if named else path, map_location="cpu", weights_only=True,
                                     mmap=not named and _is_zip(path))
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise ValueError(_cut(path, error)) from error
        raise ValueError(
            f"{path.name} holds more than weights ({_found_in(error)}), so it is not opened: unpickling it could run "
            "code. Get a safetensors file, or convert it where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(_cut(path, error)) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path.name} holds a {type(tensors).__name__}, not a table of weights.")
    return dict(tensors)


def _cut(path: Path, error: BaseException) -> str:
    return (f"{path.name} is not a whole torch file ({first_line(error).partition('. ')[0]}): "
            f"{path.stat().st_size:,} bytes are there. Compare its size with the original and download it again.")


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _found_in(error: BaseException) -> str:
    """What torch met that is no weight, without its advice on how to load the file all the same."""
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error: (.+)", str(error))
    return found[1] if found else first_line(error)


def first_line(error: BaseException) -> str:
    """Of what another library says, as much as fits into a sentence, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


def save(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None):
    """safetensors' save_file, whose own error names no file. Raises OSError, for a full disk among others."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_file(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    """Write safetensors under `path` at once or not at all. One tensor under several names is written under each."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    seen, whole = set(), {}
    for key, value in tensors.items():
        value = value.detach().contiguous()
        whole[key] = value.clone() if value.data_ptr() in seen else value  # safetensors refuses shared memory
        seen.add(value.data_ptr())
    try:
        save(whole, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def without_prefix(tensors: Mapping) -> dict:
    """Take the wrappers that other programs put before every key off again."""
    tensors = dict(tensors)
    stripped = True
    while tensors and stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key[len(prefix):]: value for key, value in tensors.items()}
                stripped = True
    return tensors


def family_of(keys: Iterable[str]) -> str | None:
    """The family whose mark the keys carry, in words for an error message; None when none is known."""
    keys = list(keys)
    names = set(keys)
    for prefix in PREFIXES:
        names |= {key[len(prefix):] for key in keys if key.startswith(prefix)}
    for family, marks in MARKS.items():
        for mark in marks:
            if mark in names or (mark.startswith("*") and any(key.endswith(mark[1:]) for key in keys)):
                return family
    return None


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], what: str):
    """Load every weight, or raise ValueError that counts and names those that do not fit."""
    check_fit(module, tensors, what)
    module.load_state_dict(tensors, strict=True)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str):
    """Raise ValueError that counts and names the weights that do not fit, if there are any."""
    own = module.state_dict()
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    wrong = [f"{key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}"
             for key in own if key in tensors and tensors[key].shape != own[key].shape]
    complaints = [f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                  for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
                  if names]
    if complaints:
        raise ValueError(f"The weights do not fit {what}. " + "; ".join(complaints) + ".")


def metadata_config(metadata: Mapping[str, str], family: str) -> dict | None:
    """The configuration that our own files carry in their metadata; None in anybody else's file."""
    if metadata.get("pixstack.family") != family:
        return None
    return json.loads(metadata["pixstack.config"])
