"""Annotators under ComfyUI's memory management: pictures in, hints out."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import numpy
import torch
from PIL import Image
from torch import Tensor

from ....models_impl.annotators import canny, depth, hed
from ....models_impl.annotators.resize import seen
from ....models_impl.guard import reading
from ..common import memory
from ..common.patcher import patcher
from ..common.pictures import colours

MOST = 16  # pictures in one call of a network
HED_BYTES = 3 * 64 * 4  # of its widest layer, for a pixel: in, out and room to compute
DEPTH_BYTES = 4096  # generous: what a large ViT with its decoder holds per pixel


def picture(path: Path) -> Tensor:
    """A picture file as an IMAGE, (1, H, W, 3) in [0, 1]."""
    with Image.open(path) as opened:
        return torch.from_numpy(numpy.array(opened.convert("RGB"))).float()[None] / 255


def hed_edges(path: str, image: Tensor, strength: float = 1.0, resolution: int = 0) -> Tensor:
    """image: (B, H, W, 3) in [0, 1] -> soft edges (B, H, W, 3) in [0, 1]. resolution: see `seen`."""
    with reading(path):
        net = patcher(hed.load(path), offload_device=torch.device("cpu"))
    return annotated(image, resolution, lambda pictures: net.model(pictures)[1] * strength, net, HED_BYTES)


def canny_edges(image: Tensor, detector: str, low: float, high: float, resolution: int = 0) -> Tensor:
    """image: (B, H, W, 3) in [0, 1] -> edges (B, H, W, 3), white on black."""
    return annotated(image, resolution, lambda pictures: canny.edges(pictures, low, high, detector))


def depth_map(folder: str, image: Tensor, numbers: str, resolution: int = 0) -> Tensor:
    """image: (B, H, W, 3) in [0, 1] -> depth (B, H, W, 3) in [0, 1], near is bright.

    numbers: what the model's numbers do: "grow with distance", "shrink with distance", or "auto" by its configuration.
    """
    model = depth.load(folder)
    distance = depth.grows_with_distance(model.config) if numbers == "auto" else numbers == "grow with distance"
    net = patcher(model, offload_device=torch.device("cpu"))

    def look(pictures: Tensor) -> Tensor:
        try:
            return net.model(pictures, resize=resolution == 0)
        except ValueError as error:
            raise ValueError(f"{Path(folder).name} cannot take {pictures.shape[-1]}x{pictures.shape[-2]} pixels "
                             f"({error}). With resolution 0 it takes the size it was made for.") from error

    return annotated(image, resolution, look, net, DEPTH_BYTES,
                     lambda prediction: depth.normalised(prediction, distance))


def annotated(image: Tensor, resolution: int, look: Callable[[Tensor], Tensor], net=None, pixel_bytes: int = 64,
              finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """image: an IMAGE -> (B, H, W, 3) in [0, 1]. `look` is called with as many pictures at once,
    (b, 3, h, w), as fit into memory, at the size of `resolution`; `finish` with its result at the picture's own size.

    net: the ModelPatcher of a network, which is then on its device.
    """
    image = colours(image)
    device = net.load_device if net else mm.get_torch_device()
    bar, hints, done = comfy.utils.ProgressBar(len(image)), [], 0
    while done < len(image):
        mm.throw_exception_if_processing_interrupted()
        pictures, back = seen(image[done : done + MOST].movedim(-1, 1), resolution)
        needed = pixel_bytes * pictures.shape[-2] * pictures.shape[-1]
        if net:
            mm.load_models_gpu([net], memory_required=needed)
        free = memory.free(net, device) if net else mm.get_free_memory(device)
        count = max(1, min(len(pictures), int(free / 2 / needed)))
        hint = back(look(pictures[:count].to(device, torch.float32)).to("cpu"))
        hint = hint if finish is None else finish(hint)
        hints.append(hint.clamp(0, 1).to(mm.intermediate_device()))
        done += count
        bar.update(count)
    return torch.cat(hints).movedim(1, -1).expand(-1, -1, -1, 3).contiguous()
