"""Files into MODEL objects that ComfyUI can patch, offload and cast."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch

from ...models_impl.pixelflow import checkpoint
from ...models_impl.state_dict import check_fit, read_file
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
        config, tensors = checkpoint.read(*read_file(file), weights=weights, beside=checkpoint.config_beside(file))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    model_config = pixelflow.ModelConfig(config)
    supported, parameters = model_config.supported_inference_dtypes, comfy.utils.calculate_parameters(tensors)
    if dtype is None:
        stored = comfy.utils.weight_dtype(tensors)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast = mm.unet_manual_cast(dtype, mm.get_torch_device(), supported)
    if cast is None and dtype not in supported:  # ComfyUI would compute in float16 where that is stored
        cast = mm.unet_dtype(model_params=parameters, supported_dtypes=supported)
    model_config.set_inference_dtype(dtype, cast)
    model = model_config.get_model(tensors, device=mm.unet_inital_load_device(parameters, dtype))
    check_fit(model.diffusion_model, tensors, f"PixelFlow ({file.name})")
    patched = patcher(model)
    if getattr(patched, "is_dynamic", bool)():  # after 0.3.75: the weights stay in the file's memory map
        model.load_model_weights(tensors, "", assign=True)
    else:
        model.diffusion_model.load_state_dict(tensors)
    return patched
