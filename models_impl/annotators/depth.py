"""Depth by any transformers depth model in a folder: near is bright.

Released hints hold inverse depth from 0 to 1 within each picture. (MiDaS in src/flux/annotator of chfyfr/PixelPonder)
"""
from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..parsing import from_json
from ..state_dict import first_line

METRIC = ("depth_pro", "glpn", "zoedepth", "prompt_depth_anything")  # model types whose numbers grow with distance
LOCAL = dict(local_files_only=True, trust_remote_code=False)  # nothing is downloaded, no code of a folder is run
FLAT = 1e-6  # the range of a picture without any depth


class Depth(nn.Module):
    """A network of transformers in a plain module, on which the host may record its device, and its image processor."""

    def __init__(self, network: nn.Module, processor):
        super().__init__()
        self.network, self.processor, self.config = network, processor, network.config

    def forward(self, image: Tensor, resize: bool = True) -> Tensor:
        return depth(self.network, self.processor, image, resize=resize)


def load(folder: str | os.PathLike) -> Depth:
    """The model of a folder with config.json. Nothing is downloaded, no code of it is run.

    Raises ValueError for a folder that holds no depth model.
    """
    folder = Path(folder)
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    except ImportError as error:
        raise ImportError("Depth needs the package transformers, which ComfyUI brings: pip install transformers"
                          ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder.name} holds no config.json: it is not the folder of a transformers model.")
    config = from_json((folder / "config.json").read_bytes(), f"{folder.name}/config.json")
    kind = config.get("model_type", "unknown") if isinstance(config, dict) else "unknown"
    try:
        network = AutoModelForDepthEstimation.from_pretrained(folder, **LOCAL)
        processor = AutoImageProcessor.from_pretrained(folder, use_fast=False, **LOCAL)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder.name} (model type {kind}) cannot be read as a depth model: {first_line(error)}. The "
                         "folder needs config.json, preprocessor_config.json and model.safetensors.") from error
    return Depth(network, processor).eval().requires_grad_(False)


def grows_with_distance(config) -> bool:
    """Whether the model of this configuration predicts distance, not its inverse."""
    return config.model_type in METRIC or getattr(config, "depth_estimation_type", "relative") == "metric"


def depth(network: nn.Module, processor, image: Tensor, *, resize: bool = True) -> Tensor:
    """image: (B, 3, H, W) in [0, 1] -> the model's prediction, (B, 1, H, W), float32.

    resize: at the size that the model's processor brings pictures to; else at the picture's own, its edge repeated
    until the model's patches cover it.
    """
    height, width = image.shape[-2:]
    if not resize:
        patch = patch_size(network.config)
        image = F.pad(image, (0, -width % patch, 0, -height % patch), mode="replicate")
    pictures = list(image.float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy())
    sizes = {} if resize else dict(do_resize=False)
    if hasattr(processor, "do_pad"):
        sizes["do_pad"] = False  # ZoeDepth's border, which would stay in the map
    pixels = processor(pictures, return_tensors="pt", input_data_format="channels_first", **sizes)["pixel_values"]
    weight = next(network.parameters())
    prediction = network(pixel_values=pixels.to(weight)).predicted_depth.float()
    prediction = prediction.view(len(image), 1, *prediction.shape[-2:])
    prediction = F.interpolate(prediction, size=image.shape[-2:], mode="bicubic")
    return prediction[..., :height, :width]


def patch_size(config) -> int:
    """Pixels along a side of the patches that the network of this configuration cuts."""
    for part in (config, getattr(config, "backbone_config", None)):
        if size := getattr(part, "patch_size", None):
            return size if isinstance(size, int) else max(size)
    return 1


def normalised(prediction: Tensor, distance: bool) -> Tensor:
    """(B, 1, H, W) -> [0, 1] within each picture, 1 where it is nearest. distance: `prediction` grows with distance.

    A distance is inverted first, so that it falls off as released hints do. A picture without any depth is black.
    """
    if distance:
        prediction = 1 / prediction.clamp(min=1e-3)
    low, high = prediction.amin((1, 2, 3), keepdim=True), prediction.amax((1, 2, 3), keepdim=True)
    spread = high - low
    return torch.where(spread > FLAT, (prediction - low) / spread.clamp(min=FLAT), torch.zeros_like(prediction))
