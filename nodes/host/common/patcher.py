"""Networks with their weights as ComfyUI's ModelPatchers, which move, patch and offload them, lazily after 0.3.75."""
from __future__ import annotations

from collections.abc import Callable

import comfy.model_management as mm
import comfy.model_patcher
import torch

from ....models_impl.state_dict import check_fit
from . import quantised


def patcher(model, load_device=None, offload_device=None, disable_dynamic: bool = False):
    """ComfyUI after 0.3.75 rebinds CoreModelPatcher when it starts, so the name is looked up at each call.

    disable_dynamic: the plain ModelPatcher also where ComfyUI would take its dynamic one.
    """
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return kind(
        model,
        load_device=load_device or mm.get_torch_device(),
        offload_device=offload_device or mm.unet_offload_device(),
    )


def with_weights(net: torch.nn.Module, tensors: dict, what: str, **devices):
    """A network in a ModelPatcher (`patcher` says with which devices), with the weights of a file.

    Raises ValueError that counts and names the weights that do not fit.
    """
    check_fit(net, tensors, what)
    patched = patcher(net, **devices)
    put(patched, net, tensors)
    return patched


def put(patched, net: torch.nn.Module, tensors: dict):
    """Load tensors that fit into a network of a ModelPatcher, in the dtypes that the network was made with."""
    if is_dynamic(patched):  # the weights stay in the file's memory map
        mm.archive_model_dtypes(net)  # ComfyUI casts to these when it moves the weights
        net.load_state_dict(quantised.for_net(net, tensors, assign=True), assign=True)
    else:
        net.load_state_dict(quantised.for_net(net, tensors))
        to_own_dtypes(net)


def is_dynamic(patched) -> bool:
    """Whether ComfyUI moves weights when they are used, which those after 0.3.75 do on some devices."""
    return getattr(patched, "is_dynamic", bool)()


def to_own_dtypes(net: torch.nn.Module):
    """Cast the weights that loading has made, which have the file's dtype, to what their layer was made with."""
    for layer in net.modules():
        for name, value in layer.named_parameters(recurse=False):
            dtype = getattr(layer, f"{name}_comfy_model_dtype", None)
            if dtype is not None and dtype != value.dtype:
                value.data = value.data.to(dtype)


def reloadable(patched, load: Callable, *arguments):
    """The ModelPatcher, with how to make it again from its file.

    ComfyUI after 0.3.75 asks for that where it needs the weights a second time: torch.compile, hooks and another
    device, for which it adds disable_dynamic=True, and several GPUs.
    """
    patched.cached_patcher_init = (load, arguments)
    return patched
