"""PixelPonder's files as CONTROL_NETs."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import torch

from ....models_impl.guard import reading
from ....models_impl.pixelponder import checkpoint
from ....models_impl.pixelponder.model import PixelPonder
from ....models_impl.state_dict import read_file
from ..common import quantised
from ..common.patcher import reloadable, with_weights
from ..common.shown import warn
from .control import PixelPonderControl

INFERENCE_DTYPES = (torch.bfloat16, torch.float32)  # residuals are whole hidden states: float16 may not hold them


def load_pixelponder(path: str, select_net: bool = False, dtype: torch.dtype | None = None) -> PixelPonderControl:
    """A PixelPonder file as CONTROL_NET. select_net: keep the selection network too; dtype None: ComfyUI chooses."""
    return PixelPonderControl(*_load(path, select_net, dtype))


def load_patcher(path: str, select_net: bool = False, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """The network of a PixelPonder file as a ModelPatcher."""
    return _load(path, select_net, dtype, disable_dynamic)[0]


def _load(path: str, select_net: bool, dtype: torch.dtype | None, disable_dynamic: bool = False):
    """(the network as a ModelPatcher, the dtype that it computes in)."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file, quantised.runnable())
        config, tensors = checkpoint.read(tensors, metadata, select_net=select_net)
        untrained = select_net and checkpoint.select_net_is_untrained(tensors)
    if untrained:
        warn(f"{file.name}: the selection network is as it was initialised, before any training, so what it selects "
             "means nothing. It costs time and memory; 'released' gives nearly the same picture.")
    parameters, device = comfy.utils.calculate_parameters(tensors), mm.get_torch_device()
    kept = quantised.kept(tensors, dtype)
    stored = None if kept else dtype
    stored = stored or mm.unet_dtype(
        model_params=parameters, supported_dtypes=INFERENCE_DTYPES, weight_dtype=comfy.utils.weight_dtype(tensors)
    )
    cast = mm.unet_manual_cast(None if kept else stored, device, INFERENCE_DTYPES)
    if cast is None and stored not in INFERENCE_DTYPES:
        cast = mm.unet_dtype(model_params=parameters, supported_dtypes=INFERENCE_DTYPES)
    with reading(file):
        net = PixelPonder(config, operations=quantised.operations(stored, cast, kept), dtype=stored,
                          device=mm.unet_offload_device())
        patched = with_weights(net.eval(), tensors, f"a PixelPonder ControlNet ({file.name})",
                               disable_dynamic=disable_dynamic)
    return reloadable(patched, load_patcher, path, select_net, dtype), cast or stored
