"""Canny edges, as the ControlNet of Stable Cascade was trained on them.

(CannyFilter in modules/controlnet.py of Stability-AI/StableCascade@7a7d341f, MIT; the detector is OpenCV's.)
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RESIZE = 224


def canny(image: Tensor, low: float = 100, high: float = 200, resize: int | None = RESIZE) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W) in [0, 1], float32 on the device of the image.

    low, high: thresholds of the gradient. resize: the side of the square, aspect ratio ignored, at which edges are
    sought before they are stretched back, which is what the released ControlNet knows; None: at the picture's own size.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("Canny edges need OpenCV: pip install opencv-python-headless.") from error
    size, image = image.shape[-2:], image.float()
    if resize is not None:
        image = F.interpolate(image, size=(resize, resize), mode="bilinear")
    pixels = image.mul(255).permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()  # cut, not rounded
    edges = torch.stack([torch.from_numpy(cv2.Canny(picture, low, high)) for picture in pixels])[:, None].float() / 255
    if resize is not None:
        edges = F.interpolate(edges, size=size, mode="bilinear")
    return edges.to(image.device)
