"""MODEL objects made of tensors, which ComfyUI can patch, offload and cast."""
from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
import torch

from ....models_impl.state_dict import check_fit, config_tensor
from . import quantised
from .patcher import is_dynamic, patcher, put

DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
FAST = "fp8_e4m3fn_fast"  # stored as fp8_e4m3fn, and multiplied in it where the device can
MODEL_DTYPES = {**DTYPES, FAST: torch.float8_e4m3fn}


def save_configuration(model_config, family: str, entries: dict):
    """Have core's nodes that save a model write its configuration too. model_config: of core's own class."""
    with_prefix = model_config.process_unet_state_dict_for_saving
    model_config.process_unet_state_dict_for_saving = lambda state_dict: {
        **with_prefix(state_dict), **config_tensor(family, entries)}


def as_model(model_config, tensors: dict, dtype: torch.dtype | None, what: str, disable_dynamic: bool,
             fast: bool = False):
    """A MODEL in a ModelPatcher, from tensors under the network's own names.

    model_config: a comfy.supported_models_base.BASE of the family; dtype: of the storage, None lets ComfyUI choose;
    what: the file as errors call it; disable_dynamic: a plain ModelPatcher; fast: multiply in fp8 as well.
    Raises ValueError for weights that do not fit.
    """
    supported, parameters = model_config.supported_inference_dtypes, comfy.utils.calculate_parameters(tensors)
    kept = quantised.kept(tensors, dtype)
    for name, value in quantised.entries(kept).items():
        setattr(model_config, name, value)
    if dtype is None or kept:
        stored = None if kept else comfy.utils.weight_dtype(tensors)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast = mm.unet_manual_cast(None if kept else dtype, mm.get_torch_device(), supported)
    if cast is None and dtype not in supported:  # ComfyUI would compute in float16 if that is the stored dtype
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
