"""Annotators under ComfyUI's memory management: pictures in, hints out, one after the other."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from ...models_impl.annotators import hed
from .load import patcher


def hed_edges(path: str, image: Tensor, strength: float = 1.0) -> Tensor:
    """image: (B, H, W, 3) in [0, 1] -> soft edges (B, H, W, 3) in [0, 1]."""
    try:
        net = patcher(hed.load(path), offload_device=torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error
    mm.load_models_gpu([net])
    bar, edges = comfy.utils.ProgressBar(len(image)), []
    for picture in image[..., :3].movedim(-1, 1).split(1):
        mm.throw_exception_if_processing_interrupted()
        _, edge = net.model(picture.to(net.load_device, torch.float32))
        edges.append((edge * strength).clamp(0, 1).to(mm.intermediate_device()))
        bar.update(1)
    return torch.cat(edges).movedim(1, -1).expand(-1, -1, -1, 3).contiguous()
