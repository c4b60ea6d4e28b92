"""Layers whose weights are made when a file is loaded into them, as ComfyUI's Linear and Embedding are under
DynamicVRAM (comfy/ops.py, `_lazy_load_from_state_dict`), here for every kind of layer, so that a ComfyUI without it can
test what they ask for."""

from __future__ import annotations

import torch
from torch import nn

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "GroupNorm", "LayerNorm",
         "RMSNorm", "Embedding")


def begin_without_weights(kind: type):
    """(__init__, _load_from_state_dict) of a class of layers, made lazy."""
    make = kind.__init__

    def __init__(self, *args, **kwargs):
        make(self, *args, **{**kwargs, "device": "meta"})  # which takes no memory
        self.comfy_need_lazy_init_bias = getattr(self, "bias", None) is not None
        for name in [name for name, value in self._parameters.items() if value is not None]:
            setattr(self, f"{name}_comfy_model_dtype", self._parameters.pop(name).dtype)
            setattr(self, name, None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        for key, value in state_dict.items():  # of any shape, and in its own dtype, as there
            name = key[len(prefix):]
            if name not in ("weight", "bias"):
                unexpected_keys.append(key)
                continue
            value = value if local_metadata.get("assign_to_params_buffers") else value.clone()
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        missing_keys += [prefix + name for name in ("weight", "bias")
                         if getattr(self, name, self) is None and hasattr(self, f"{name}_comfy_model_dtype")]

    return __init__, _load_from_state_dict


def lazy(kind: type) -> type:
    """A class of layers, made lazy."""
    make, load = begin_without_weights(kind)
    return type(f"Lazy{kind.__name__}", (kind,), {"__init__": make, "_load_from_state_dict": load})


class Operations:
    """torch.nn's layers, made lazy, as `operations` of our networks."""


for name in KINDS:
    setattr(Operations, name, lazy(getattr(nn, name)))


def patch_comfyui(monkeypatch, ops):
    """Make the layers of `comfy.ops` lazy, and with them all that derive from them."""
    for name in KINDS:
        if kind := getattr(ops.disable_weight_init, name, None):
            make, load = begin_without_weights(kind)
            monkeypatch.setattr(kind, "__init__", make)
            monkeypatch.setattr(kind, "_load_from_state_dict", load)


class DynamicPatcher:
    """The part of a dynamic ModelPatcher that `put` uses."""

    @staticmethod
    def is_dynamic() -> bool:
        return True


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
