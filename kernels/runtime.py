"""Which fast implementations this process has, and whether they can take given tensors. Nothing else asks."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@cache
def library(name: str) -> ModuleType | None:
    """An installed library, imported at its first use; None where it is missing or cannot be loaded."""
    try:
        return import_module(name)
    except (ImportError, OSError):  # OSError: a build for another CUDA
        return None


def kitchen(operation: str, *tensors: Tensor) -> Callable | None:
    """An operation of comfy-kitchen, which newer ComfyUIs bring, where it can take these tensors: on CUDA and without
    gradients, which it does not compute. Else None, and None while torch.compile traces: it fuses the reference."""
    if not all(t.is_cuda for t in tensors) or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    return getattr(library("comfy_kitchen"), operation, None)


def bitsandbytes(x: Tensor) -> ModuleType | None:
    """bitsandbytes where its products in 4 bits can take x: on CUDA. None while torch.compile traces."""
    return library("bitsandbytes") if x.is_cuda and not torch.compiler.is_compiling() else None


def has_flash_attention(q: Tensor) -> bool:
    """Whether FlashAttention 2 supports the device and dtype of q: 16 bits, on CUDA from Ampere on."""
    return q.is_cuda and q.dtype in HALF and torch.cuda.get_device_capability(q.device) >= (8, 0)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed, which autocast may change."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
