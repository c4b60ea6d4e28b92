"""Files into MODEL objects that ComfyUI can patch, offload and cast."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ...models_impl.flux import checkpoint as flux_checkpoint
from ...models_impl.pixart import checkpoint as pixart_checkpoint
from ...models_impl.pixart.controlnet import PixArtControlNet
from ...models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from ...models_impl.state_dict import check_fit, load_into, metadata_config, read_file
from . import flux, pixart, pixart_control, pixelflow

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
    tensors, metadata = read_file(file)
    try:
        config, tensors = pixelflow_checkpoint.read(
            tensors, metadata, weights=weights, beside=pixelflow_checkpoint.config_beside(file)
        )
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    return _as_model(pixelflow.ModelConfig(config), tensors, dtype, f"PixelFlow ({file.name})")


def load_pixart(path: str, weights: str = "ema", dtype: torch.dtype | None = None, settings: dict | None = None):
    """A PixArt file as a ModelPatcher. settings: entries of PixArtConfig that the user knows better than the file."""
    file = Path(path)
    tensors, metadata = read_file(file)
    try:
        config, tensors = pixart_checkpoint.read(
            tensors, metadata, weights=weights, config=settings, beside=pixart_checkpoint.beside(file)
        )
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    return _as_model(pixart.ModelConfig(config), tensors, dtype, f"PixArt ({file.name})")


def load_flux(path: str, dtype: torch.dtype | None = None):
    """A FLUX that states its configuration, as the trainer's exports do, as core's own model in a ModelPatcher."""
    file = Path(path)
    tensors, metadata = read_file(file)
    try:
        config, tensors = flux_checkpoint.read(tensors, metadata)
        if metadata_config(metadata, flux_checkpoint.FAMILY) is None:
            raise ValueError("This FLUX does not state its configuration, as exports of PixStack's trainer do. Load "
                             "released FLUX files with core's 'Load Diffusion Model'.")
        model_config = flux.model_config(config)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    return _as_model(model_config, tensors, dtype, f"FLUX ({file.name})")


def _as_model(model_config, tensors: dict, dtype: torch.dtype | None, what: str):
    supported, parameters = model_config.supported_inference_dtypes, comfy.utils.calculate_parameters(tensors)
    if dtype is None:
        stored = comfy.utils.weight_dtype(tensors)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast = mm.unet_manual_cast(dtype, mm.get_torch_device(), supported)
    if cast is None and dtype not in supported:  # ComfyUI would compute in float16 where that is stored
        cast = mm.unet_dtype(model_params=parameters, supported_dtypes=supported)
    model_config.set_inference_dtype(dtype, cast)
    model = model_config.get_model(tensors, device=mm.unet_inital_load_device(parameters, dtype))
    check_fit(model.diffusion_model, tensors, what)
    patched = patcher(model)
    if getattr(patched, "is_dynamic", bool)():  # after 0.3.75: the weights stay in the file's memory map
        model.load_model_weights(tensors, "", assign=True)
    else:
        model.diffusion_model.load_state_dict(tensors)
    return patched


def load_pixart_controlnet(path: str, dtype: torch.dtype | None = None) -> pixart_control.PixArtControl:
    """A PixArt ControlNet file, with or without the base model in it, as CONTROL_NET."""
    file = Path(path)
    tensors, metadata = read_file(file)
    try:
        config, blocks, tensors = pixart_checkpoint.read_controlnet(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    parameters, supported = comfy.utils.calculate_parameters(tensors), pixart.INFERENCE_DTYPES
    stored = dtype or mm.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(tensors)
    )
    cast = mm.unet_manual_cast(stored, mm.get_torch_device(), supported)
    operations = comfy.ops.pick_operations(stored, cast)
    net = PixArtControlNet(config, blocks, operations=operations, dtype=stored, device=mm.unet_offload_device())
    load_into(net, tensors, f"a PixArt ControlNet ({file.name})")
    return pixart_control.PixArtControl(patcher(net.eval()))
