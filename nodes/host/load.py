"""Files into MODEL objects that ComfyUI can patch, offload and cast."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
import yaml

from ...models_impl.pixelflow import checkpoint
from ...models_impl.state_dict import load_into, read_file
from . import pixelflow

DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


def patcher(model, load_device=None, offload_device=None):
    """ComfyUI after 0.3.75 rebinds CoreModelPatcher when it starts, so the name is looked up at each call."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(
        model,
        load_device=load_device or mm.get_torch_device(),
        offload_device=offload_device or mm.unet_offload_device(),
    )


def load_pixelflow(path: str, weights: str = "ema", dtype: torch.dtype | None = None):
    """A PixelFlow file as a ModelPatcher; dtype None lets ComfyUI choose the storage."""
    file = Path(path)
    try:
        config, tensors = checkpoint.read(*read_file(file), weights=weights, config=config_beside(file))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    model_config = pixelflow.ModelConfig(config)
    supported, parameters = model_config.supported_inference_dtypes, comfy.utils.calculate_parameters(tensors)
    if dtype is None:
        stored = comfy.utils.weight_dtype(tensors)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    model_config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, mm.get_torch_device(), supported))
    model = model_config.get_model(tensors, device=mm.unet_inital_load_device(parameters, dtype))
    patched = patcher(model)
    if hasattr(patched, "is_dynamic") and patched.is_dynamic():  # after 0.3.75: weights stay in the file's memory map
        model.load_model_weights(tensors, "", assign=True)
    else:
        load_into(model.diffusion_model, tensors, f"PixelFlow ({file.name})")
    return patched


def config_beside(file: Path) -> dict | None:
    """The yaml of a release or a training run that lies beside its checkpoint: `<same name>.yaml` or `config.yaml`."""
    for candidate in (file.with_suffix(".yaml"), file.with_name("config.yaml")):
        if candidate.is_file():
            entries = yaml.safe_load(candidate.read_text(encoding="utf-8"))
            model = entries.get("model") if isinstance(entries, dict) else None
            if isinstance(model, dict) and "attention_head_dim" in model.get("params", {}):  # else another family's
                return {"model": model, "scheduler": entries.get("scheduler") or {}}
    return None
