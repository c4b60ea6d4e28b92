"""Files into MODEL objects that ComfyUI can patch, offload and cast."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch

from ....models_impl.flux import checkpoint as flux_checkpoint
from ....models_impl.pixart import checkpoint as pixart_checkpoint
from ....models_impl.pixart.controlnet import PixArtControlNet
from ....models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from ....models_impl.state_dict import check_fit, metadata_config, read_file
from ..flux import model as flux
from ..pixart import control as pixart_control
from ..pixart import model as pixart
from ..pixelflow import model as pixelflow
from . import quantised
from .patcher import is_dynamic, patcher, put, reloadable, with_weights

DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
FAST = "fp8_e4m3fn_fast"  # stored as fp8_e4m3fn, and multiplied in it where the device can
MODEL_DTYPES = {**DTYPES, FAST: torch.float8_e4m3fn}


def load_pixelflow(
    path: str, weights: str = "ema", dtype: torch.dtype | None = None, fast: bool = False,
    disable_dynamic: bool = False,
):
    """A PixelFlow file as a ModelPatcher; dtype None lets ComfyUI choose the storage; fast: multiply in fp8 as well."""
    file = Path(path)
    tensors, metadata = read_file(file, quantised.runnable())
    try:
        config, tensors = pixelflow_checkpoint.read(
            tensors, metadata, weights=weights, beside=pixelflow_checkpoint.config_beside(file)
        )
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    model = _as_model(pixelflow.ModelConfig(config), tensors, dtype, f"PixelFlow ({file.name})", disable_dynamic,
                      fast)
    return reloadable(model, load_pixelflow, path, weights, dtype, fast)


def load_pixart(
    path: str, weights: str = "ema", dtype: torch.dtype | None = None, settings: dict | None = None,
    fast: bool = False, disable_dynamic: bool = False,
):
    """A PixArt file as a ModelPatcher. settings: entries of PixArtConfig that the user knows better than the file;
    dtype and fast: as in `load_pixelflow`."""
    file = Path(path)
    tensors, metadata = read_file(file, quantised.runnable())
    try:
        config, tensors = pixart_checkpoint.read(
            tensors, metadata, weights=weights, config=settings, beside=pixart_checkpoint.beside(file)
        )
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    model = _as_model(pixart.ModelConfig(config), tensors, dtype, f"PixArt ({file.name})", disable_dynamic, fast)
    return reloadable(model, load_pixart, path, weights, dtype, settings, fast)


def load_flux(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """A FLUX that states its configuration, as the trainer's exports do, as core's own model in a ModelPatcher."""
    file = Path(path)
    tensors, metadata = read_file(file, quantised.runnable())
    try:
        config, tensors = flux_checkpoint.read(tensors, metadata)
        if metadata_config(metadata, flux_checkpoint.FAMILY) is None:
            raise ValueError("This FLUX does not state its configuration, as exports of PixStack's trainer do. Load "
                             "released FLUX files with core's 'Load Diffusion Model'.")
        model_config = flux.model_config(config)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    return reloadable(_as_model(model_config, tensors, dtype, f"FLUX ({file.name})", disable_dynamic), load_flux, path,
                      dtype)


def _as_model(model_config, tensors: dict, dtype: torch.dtype | None, what: str, disable_dynamic: bool,
              fast: bool = False):
    supported, parameters = model_config.supported_inference_dtypes, comfy.utils.calculate_parameters(tensors)
    kept = quantised.kept(tensors, dtype)
    for name, value in quantised.entries(kept).items():
        setattr(model_config, name, value)
    if dtype is None or kept:
        stored = None if kept else comfy.utils.weight_dtype(tensors)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast = mm.unet_manual_cast(None if kept else dtype, mm.get_torch_device(), supported)
    if cast is None and dtype not in supported:  # ComfyUI would compute in float16 where that is stored
        cast = mm.unet_dtype(model_params=parameters, supported_dtypes=supported)
    model_config.set_inference_dtype(dtype, cast)
    model_config.optimizations["fp8"] = fast
    tensors = model_config.process_unet_state_dict(tensors)  # core's FLUX after 0.3.75 has other names
    model = model_config.get_model(tensors, device=mm.unet_inital_load_device(parameters, dtype))
    check_fit(model.diffusion_model, tensors, what)
    patched = patcher(model, disable_dynamic=disable_dynamic)
    if fast and is_dynamic(patched):
        tensors = quantised.in_fp8(model.diffusion_model, tensors)
    put(patched, model.diffusion_model, tensors)
    return patched


def load_pixart_controlnet(path: str, dtype: torch.dtype | None = None) -> pixart_control.PixArtControl:
    """A PixArt ControlNet file, with or without the base model in it, as CONTROL_NET."""
    return pixart_control.PixArtControl(pixart_controlnet(path, dtype))


def pixart_controlnet(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """The network of a PixArt ControlNet file as a ModelPatcher."""
    file = Path(path)
    tensors, metadata = read_file(file, quantised.runnable())
    try:
        config, blocks, tensors = pixart_checkpoint.read_controlnet(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    parameters, supported = comfy.utils.calculate_parameters(tensors), pixart.INFERENCE_DTYPES
    kept = quantised.kept(tensors, dtype)
    stored = None if kept else dtype
    stored = stored or mm.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(tensors)
    )
    cast = mm.unet_manual_cast(None if kept else stored, mm.get_torch_device(), supported)
    # What it computes in is the base network's to say, at each run: weights of any storage follow their input.
    casts = cast is not None or kept
    operations = quantised.operations(stored, cast, kept) if casts else comfy.ops.manual_cast
    net = PixArtControlNet(config, blocks, operations=operations, dtype=stored, device=mm.unet_offload_device())
    patched = with_weights(net.eval(), tensors, f"a PixArt ControlNet ({file.name})", disable_dynamic=disable_dynamic)
    return reloadable(patched, pixart_controlnet, path, dtype)
