"""From a run to the files that ComfyUI loads: weights in the released key names, the configuration in the metadata."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ...models_impl import previews, state_dict
from ...models_impl.pixelflow import checkpoint
from ..config.load import stored
from ..training import build
from ..training.checkpoints import checkpoints, read_tensors, restore_module

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
IN_FP8 = ("block", "taesd_encoder.")  # parts of names


def open_run(folder: Path, step: int | None = None, weights: str = "ema", device: str = "cpu"):
    """The trained recipe of a run folder, ready to sample: (recipe, settings, step)."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a run folder: it has no config.json.")
    saved = checkpoints(folder)
    steps = [int(p.name) for p in saved]
    if not saved or (step is not None and step not in steps):
        raise ValueError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; there are: "
                         f"{', '.join(map(str, steps)) or 'none'}.")
    chosen = saved[-1 if step is None else steps.index(step)]
    settings = stored(folder)
    recipe = build.reopened(settings, folder)
    restore_module(recipe, read_tensors(chosen / "model.safetensors"))
    if weights == "ema" and (chosen / "ema.safetensors").exists():
        restore_average(recipe, chosen / "ema.safetensors")
    return recipe.to(device).eval(), settings, int(chosen.name)


@torch.no_grad()
def restore_average(recipe: torch.nn.Module, file: Path):
    """The EMA of the parameters that learn; a tied one, which the model's file names twice, is one here."""
    own, ema = dict(recipe.named_parameters()), read_tensors(file)
    if unknown := sorted(ema.keys() - own.keys()):
        raise ValueError(f"{file} is of another model: {len(unknown)} averaged weights have no parameter here "
                         f"({', '.join(unknown[:3])}).")
    for name, value in ema.items():
        own[name].copy_(value)


def written_as(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """As it is written. A LoRA's alpha, one number, stays as it is: rounded it would be another strength. In fp8 are
    the matrices of blocks and the kernels of a VAE's encoder only, the rest in bf16: on the small FLUX of emoji that
    costs less than a third of what it costs to round everything."""
    if not tensor.is_floating_point() or not tensor.ndim:
        return tensor
    if dtype == "fp8" and (tensor.ndim == 1 or not any(part in name for part in IN_FP8)):
        return tensor.to(torch.bfloat16)
    limit = torch.finfo(DTYPES[dtype]).max
    return tensor.clamp(-limit, limit).to(DTYPES[dtype])  # what is beyond becomes NaN in fp8


def export(folder: Path, out: Path, name: str, dtype: str = "bf16", step: int | None = None, weights: str = "ema"):
    """Writes the files of the recipe, for PixelFlow out/diffusion_models/NAME_RESOLUTION.safetensors, and
    out/text_encoders/NAME_t5.safetensors where an encoder was trained. Returns their paths."""
    recipe, settings, step = open_run(folder, step, weights)
    written = []
    for pattern, (tensors, metadata) in recipe.files().items():
        path = out / pattern.format(name=name)
        origin = {"pixstack.run": json.dumps({"name": settings.name, "step": step, "weights": weights})}
        if pattern.startswith("diffusion_models/") and settings.vae.path:
            origin |= previews.of_file(Path(settings.vae.path).expanduser())
        if pattern.startswith("diffusion_models/") and settings.needs == "classes":
            origin |= checkpoint.named(build.class_names(folder))
        tensors = {k: written_as(k, v, dtype) for k, v in tensors.items()}
        state_dict.write_file(path, tensors, {**metadata, **origin})
        written.append(path)
    return written
