"""Free memory, and running out of it, through the interfaces of the running ComfyUI."""
from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher


def free(patcher: ModelPatcher, device: torch.device) -> int:
    """Bytes of `device` that a computation of `patcher` can use.

    Weights that ComfyUI's DynamicVRAM would give up for it count as free, but only if the patcher is asked.
    """
    if hasattr(patcher, "get_free_memory"):
        return patcher.get_free_memory(device)
    return mm.get_free_memory(device)


def is_oom(error: Exception) -> bool:
    """Whether the device ran out of memory, which newer torch may also report as an AcceleratorError."""
    if hasattr(mm, "is_oom"):
        return mm.is_oom(error)
    return isinstance(error, mm.OOM_EXCEPTION)
