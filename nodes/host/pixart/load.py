"""PixArt files as MODEL, its ControlNets as CONTROL_NET."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch

from ....models_impl.guard import reading
from ....models_impl.pixart import checkpoint
from ....models_impl.pixart.controlnet import PixArtControlNet
from ....models_impl.state_dict import read_file
from ..common import quantised, step_cache
from ..common.load import as_model
from ..common.patcher import reloadable, with_weights
from ..common.previews import colour
from .control import PixArtControl
from .model import INFERENCE_DTYPES, ModelConfig


def load_pixart(
    path: str, weights: str = "ema", dtype: torch.dtype | None = None, settings: dict | None = None,
    fast: bool = False, disable_dynamic: bool = False,
):
    """A PixArt file as a ModelPatcher. settings: entries of PixArtConfig that override the file's;
    dtype and fast: storage and product as in `as_model`."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file, quantised.runnable())
        config, tensors = checkpoint.read(
            tensors, metadata, weights=weights, config=settings, beside=checkpoint.beside(file)
        )
        model = as_model(ModelConfig(config), tensors, dtype, f"PixArt ({file.name})", disable_dynamic, fast)
        colour(model, metadata)
    return reloadable(step_cache.attach(model), load_pixart, path, weights, dtype, settings, fast)


def load_pixart_controlnet(path: str, dtype: torch.dtype | None = None) -> PixArtControl:
    """A PixArt ControlNet file, with or without the base model in it, as CONTROL_NET."""
    return PixArtControl(pixart_controlnet(path, dtype))


def pixart_controlnet(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """The network of a PixArt ControlNet file as a ModelPatcher."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file, quantised.runnable())
        config, blocks, tensors = checkpoint.read_controlnet(tensors, metadata)
    parameters, supported = comfy.utils.calculate_parameters(tensors), INFERENCE_DTYPES
    kept = quantised.kept(tensors, dtype)
    stored = None if kept else dtype
    stored = stored or mm.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(tensors)
    )
    cast = mm.unet_manual_cast(None if kept else stored, mm.get_torch_device(), supported)
    # The base network decides the compute dtype at each run: weights of any storage dtype follow their input.
    casts = cast is not None or kept
    operations = quantised.operations(stored, cast, kept) if casts else comfy.ops.manual_cast
    with reading(file):
        net = PixArtControlNet(config, blocks, operations=operations, dtype=stored, device=mm.unet_offload_device())
        patched = with_weights(net.eval(), tensors, f"a PixArt ControlNet ({file.name})",
                               disable_dynamic=disable_dynamic)
    return reloadable(patched, pixart_controlnet, path, dtype)
